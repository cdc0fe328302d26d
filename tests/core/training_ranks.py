"""Distillation on gloo ranks of this CPU for the tests: `train_on_ranks` starts them, and `train_all` is what each
of them runs.

accelerate shards on GPUs only: under `--use_fsdp` on CPUs it takes the plugin and stays data parallel. `OnCPU` sets the
two attributes that it would set on GPUs; all that follows (accelerate's preparation, PyTorch's fully_shard) is their
own code.
"""

import json
import os
import signal
import tempfile
from contextlib import nullcontext
from pathlib import Path

from ranks import run_together

ROOT = Path(__file__).parents[2]
TIMEOUT = 900.0  # some seconds of work; the rest is patience with a busy machine
RANKS = 2


def train_on_ranks(jobs: list[dict], ranks: int = RANKS) -> list[dict]:
    """Run the jobs one after the other on ``ranks`` ranks; what process 0 tells of each.

    A job: name, config (of `DistillConfig`), out (a folder), sharded, stop (the step after which process 0 gets
    SIGTERM, or 0), dies (the step after which process 1 gets SIGKILL, or nothing); frames, side and words (latent frames of its
    clips, their height and width, tokens of each text, where it says so); counted (whether the most bytes that live at once
    are told, as ``peak``). Or a recipe (of `RecipeConfig`, in place of config): see `run_recipe`.
    """
    killed = {1: -signal.SIGKILL} if any(job.get("dies") for job in jobs) else {}
    with tempfile.TemporaryDirectory() as folder:
        return run_together(train_all, [(jobs, rank, ranks, folder) for rank in range(ranks)], TIMEOUT, killed)[0]


def join(rank: int, ranks: int, folder: str) -> None:
    """Makes this process what accelerate's launcher would."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if ranks > 1:  # one alone is no rank, as without accelerate's launcher
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)


def sample_and_train(config: dict, run: str, rank: int, ranks: int, folder: str) -> dict:
    """A training on the teacher's samples, drawn by all ranks: the numbers that this one drew, whether the texts were encoded
    here, and the result."""
    import torch
    import torch.distributed as dist

    from efficient_vdit_core.distill.config import DistillConfig
    from efficient_vdit_core.distill.data import prepare
    from efficient_vdit_core.distill.families.opensora_plan import OpenSoraPlanModel
    from efficient_vdit_core.distill.runs import trainer

    join(rank, ranks, folder)
    told, noise = {"drawn": [], "encoded": 0, "file": ""}, prepare.numbered_noise

    def encoder(*_):
        told["encoded"] += 1
        return lambda texts: (torch.ones(len(texts), 2, 8), torch.ones(len(texts), 2))

    prepare.numbered_noise = lambda shape, stream, number, seed: (
        told["drawn"].append(number) or noise(shape, stream, number, seed)
    )
    OpenSoraPlanModel.text_encoder = encoder
    told["file"] = str(trainer.distill(DistillConfig.from_dict(config), Path(run)))
    if ranks > 1:
        dist.destroy_process_group()
    return told


def train_all(jobs: list[dict], rank: int, ranks: int, folder: str) -> list[dict]:
    import accelerate
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    join(rank, ranks, folder)
    accelerate.Accelerator = on_cpu(accelerate.Accelerator)
    told = []
    for job in jobs:
        os.environ.update(ACCELERATE_USE_FSDP=str(job["sharded"]).lower(), FSDP_VERSION="2")
        told.append(run_recipe(job, rank) if "recipe" in job else train(job, rank))
        if told[-1].get("dies"):
            break  # there is nobody to go on with
        AcceleratorState._reset_state(reset_partial_state=True)
        if ranks > 1:
            dist.barrier()
    if ranks > 1 and not told[-1].get("dies"):
        dist.destroy_process_group()
    return told


def on_cpu(kind):
    from accelerate.utils import DistributedType

    class OnCPU(kind):
        def __init__(self, *args, fsdp_plugin=None, **kwargs):
            super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
            if fsdp_plugin is not None:
                self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    return OnCPU


def train(job: dict, rank: int) -> dict:
    import torch
    from torch.distributed.fsdp import FSDPModule

    from efficient_vdit_core.distill.config import DistillConfig
    from efficient_vdit_core.distill.objectives import features
    from efficient_vdit_core.distill.runs import trainer
    from efficient_vdit_core.training.live_bytes import LiveBytes

    course, seen = (
        [],
        {"weights": 0, "average": 0, "blocks": 0, "teacher": 0, "times": set(), "teacher_computes": set()},
    )

    class Watched(trainer.TrainingRun):
        def _one_step(self, loss_of):
            super()._one_step(loss_of)
            course.append(dict(self.means))
            seen["weights"], seen["average"] = count_sharded(self.bare.parameters()), count_sharded(self.ema.values())
            seen["blocks"] = sum(
                isinstance(m, FSDPModule) and type(m).__name__.endswith("Block") for m in self.bare.modules()
            )
            if job["stop"] == self.step and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            if job.get("dies") == self.step and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def prepare(config, model, cache, device):
        if rank == 0:
            torch.rand(7)  # whoever makes the data draws random numbers that the others do not
        return data

    def keep_dtype(module, args, kwargs):
        seen["times"].add(str((args[1] if len(args) > 1 else kwargs["timestep"]).dtype))

    def keep_precision(module, args, out):
        seen["teacher_computes"].add(str(out.dtype))

    def make_pair(config, model, accelerator):
        student, teacher = make_both(config, model, accelerator)
        student.register_forward_pre_hook(keep_dtype, with_kwargs=True)
        seen["teacher"] = count_sharded(teacher.parameters()) if teacher else 0
        if teacher and hasattr(teacher, "transformer_blocks"):
            teacher.transformer_blocks[0].attn1.to_q.register_forward_hook(keep_precision)
        counter.count(x for part in (student, teacher) if part for x in (*part.parameters(), *part.buffers()))
        return student, teacher

    make_both, plain, keep = trainer.make_pair, trainer.TrainingRun, features.HostFeatures.keep
    trainer.TrainingRun, trainer.prepare_data, trainer.make_pair = Watched, prepare, make_pair
    trainer.check_data = lambda config, model: None  # `prepare` makes its own
    counter, data = LiveBytes(), small_data(**{name: job[name] for name in ("frames", "side", "words") if name in job})
    # The host's memory is another: what numpy holds is not counted.
    if job.get("counted"):
        features.HostFeatures.keep = lambda self, name, value: torch.from_numpy(value.numpy().copy())
    try:
        with counter if job.get("counted") else nullcontext():
            file, left = trainer.distill(DistillConfig.from_dict(job["config"]), Path(job["out"])), None
    except SystemExit as error:
        file, left = None, error.code
    except ValueError as error:
        file, left = None, str(error)
    finally:
        trainer.TrainingRun, trainer.make_pair, features.HostFeatures.keep = plain, make_both, keep
    seen["peak"] = counter.peak
    return {
        **job,
        **seen,
        "file": str(file),
        "left": left,
        "course": course,
        **{name: sorted(seen[name]) for name in ("times", "teacher_computes")},
    }


def run_recipe(job: dict, rank: int) -> dict:
    """All stages; each rank leaves ``calls-RANK.json`` in the folder: what it did there, and how many processes it knew of."""
    from accelerate.state import PartialState

    from efficient_vdit_core.distill.runs import recipe, trainer

    calls, data = [], small_data()

    def noted(name, call):
        def wrapped(*args, **kwargs):
            calls.append([name, PartialState().num_processes if PartialState._shared_state else 0])
            return call(*args, **kwargs)

        return wrapped

    trainer.check_data = recipe.check_data = lambda config, model: None
    trainer.prepare_data = recipe.prepare_data = lambda *args: data
    before = recipe.search_plans, recipe.save_safetensors
    recipe.search_plans, recipe.save_safetensors = (noted(call.__name__, call) for call in before)
    try:
        results = recipe.ThreeStages(recipe.RecipeConfig.from_dict(job["recipe"]), Path(job["out"])).run()
    finally:
        recipe.search_plans, recipe.save_safetensors = before
    (Path(job["out"]) / f"calls-{rank}.json").write_text(json.dumps(calls))
    return {**job, "results": {name: [str(file) for file in files] for name, files in results.items()}}


def count_sharded(tensors) -> int:
    """How many of them lie on this rank in part only."""
    return sum(hasattr(t, "to_local") and t.to_local().numel() < t.numel() for t in tensors)


def small_data(frames=4, side=4, words=0):
    """Random latents and text states in place of a data set's."""
    import torch

    from efficient_vdit_core.distill.data.clips import ClipSet
    from efficient_vdit_core.distill.data.prepare import PreparedData
    from efficient_vdit_core.distill.families.texts import TextBank

    g = torch.Generator().manual_seed(1)
    bank = TextBank({t: torch.randn(words or len(t) + 1, 8, generator=g) for t in ("a", "b c", "")})
    clips = ClipSet(torch.randn(6, 4, frames, side, side, generator=g), [("a",), ("b c", "a")] * 3)
    return PreparedData(clips, bank, "", torch.device("cpu"))
