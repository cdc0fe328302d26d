"""The workers' host in real processes, without a pool: two ranks build MODELs from prompts and compute sharded steps.

Run without arguments it starts one copy of itself for each rank; rank 0 prints JSON.
"""

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

RANKS = 2
PACK, COMFYUI = os.environ["EVDIT_PACK"], os.getcwd()
SPARSE = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "1", "min_tokens": 0}


def prompt(loader):
    return {
        "1": loader,
        "2": {"class_type": "EVDiTTilePlan", "inputs": {"reference_frames": 1}},
        "3": {"class_type": "EVDiTSparseAttention", "inputs": {"model": ["1", 0], "plan": ["2", 0], **SPARSE}},
    }


def wan(file):
    return {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}}


def load_core():
    folder = Path(PACK) / "efficient_vdit_core"
    spec = importlib.util.spec_from_file_location(
        "efficient_vdit_core", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    sys.modules["efficient_vdit_core"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["efficient_vdit_core"])


def save_wan(path, scale):
    """A tiny random Wan as a file that ComfyUI's own loader recognises."""
    import torch
    from comfy.ldm.wan.model import WanModel
    from comfy.ops import disable_weight_init
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = WanModel(dim=256, num_heads=2, num_layers=2, ffn_dim=256, freq_dim=256, in_dim=16, out_dim=16, text_dim=4096,
                     cross_attn_norm=True, model_type="t2v", operations=disable_weight_init, dtype=torch.float32)  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file({name: x * scale for name, x in model.state_dict().items()}, f"{path}.new")
    os.replace(f"{path}.new", path)


def ask_for_assets():
    """Have ComfyUI's server ask for who keeps its assets, as that of 0.36 does."""
    find = importlib.import_module

    def found(name, package=None):
        module = find(name, package)
        if name != "server" or "asset_manager" in inspect.signature(module.PromptServer).parameters:
            return module

        class Server(module.PromptServer):
            def __init__(self, loop, asset_manager):
                super().__init__(loop)
                self.asset_manager = asset_manager
                asset_manager.register_routes(self.app, self.user_manager)
                asset_manager.set_event_sink(self.send_sync)

        return types.SimpleNamespace(PromptServer=Server)

    importlib.import_module = found


def rank_main(rank, folder):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    load_core()
    if rank == 1:  # the other has the server of the ComfyUI that is here
        ask_for_assets()
    from efficient_vdit_core.parallel.pool.imports import COMFYUI_HOST
    from efficient_vdit_core.parallel.pool.settings import Settings
    from efficient_vdit_core.parallel.sharding.communicator import Communicator

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    comm = Communicator()
    settings = Settings(rank, RANKS, "cpu", "gloo", "", COMFYUI_HOST, (COMFYUI, PACK), "", "")
    host = COMFYUI_HOST.load()(settings, comm)
    about = {
        "root": COMFYUI,
        "version": importlib.import_module("comfyui_version").__version__,
        "argv": ["--cpu"],
        "folders": {"diffusion_models": [[folder], [".safetensors"]]},
        "input": folder,
    }
    packs = dict.fromkeys(("EVDiTModelLoader", "EVDiTTilePlan", "EVDiTSparseAttention"), PACK)
    facts, files = {}, {}

    def opened(key, graph, source, keep=()):
        about_graph = {
            "comfyui": about,
            "packs": packs,
            "prompt": graph,
            "source": source,
            "files": files,
            "sources": {},
        }
        said = host.open({"key": key, "keep": [*keep, key], **about_graph})
        facts[f"plan of {key}"] = said["plan"]
        host.models["plain"] = host.comfyui.kept[-1]

    def opened_from(path, kind="Other", code=""):
        graph = {"packs": {kind: path}, "prompt": {}, "source": ["1", 0], "files": {}, "sources": {path: code}}
        host.open({"key": "else", "keep": [], "comfyui": about, **graph})

    def two_experts():
        """The files that are read for a high and a low expert, each with a plan of its own that changes twice."""
        read, sd = [], importlib.import_module("comfy.sd")
        load = sd.load_diffusion_model
        sd.load_diffusion_model = lambda path, *a, **k: (read.append(os.path.basename(path)), load(path, *a, **k))[1]
        for name in ("high.safetensors", "low.safetensors"):
            save(1.0, f"{folder}/second/{name}")
        keys = []
        for blocks in ("0", "1", ""):
            for at, name in enumerate(("high", "low")):
                graph = {str(10 * at + int(n)): node for n, node in prompt(wan(f"{name}.safetensors")).items()}
                graph[str(10 * at + 3)]["inputs"] |= {"model": [str(10 * at + 1), 0], "plan": [str(10 * at + 2), 0]}
                graph[str(10 * at + 3)]["inputs"]["dense_blocks"] = blocks
                opened(f"{name} {blocks}", graph, [str(10 * at + 3), 0], keys[-3:])
                keys.append(f"{name} {blocks}")
        sd.load_diffusion_model = load
        held = {id(model.model) for name, model in host.models.items() if name in keys}
        return {"read": read, "whole models held": len(held)}

    def mean_weight(key):
        return float(host.models[key].model.diffusion_model.blocks[0].self_attn.q.weight.abs().mean())

    def compare(name, x, text, levels, references=None):
        worst = 0.0
        for level in levels:
            tensors = {"x": x, "t": level, "c": text}
            given = {n: {"_tensor": m} for n, m in (("x", "x"), ("t", "t"), ("c_crossattn", "c"))}
            inputs = {**given, "options": {}}
            if references is not None:
                tensors["r"], inputs["context_latents"] = references, [{"_tensor": "r"}]
            plain = host.step({"key": "plain", "inputs": inputs, "scheme": "auto"}, tensors)[1]["out"]
            said, out = host.step({"key": name, "inputs": inputs, "scheme": "auto"}, tensors)
            worst = max(worst, float((out["out"] - plain).abs().max() / plain.abs().max()))
        facts[name] = {"error": worst, "bytes": said["bytes"], "by": dict(comm.sent)}

    torch.manual_seed(1)
    with torch.inference_mode():
        tiny = {
            "class_type": "EVDiTModelLoader",
            "inputs": {"model_name": "tiny (built in)", "weight_dtype": "default"},
        }
        opened("osp", prompt(tiny), ["3", 0])
        compare("osp", torch.randn(2, 4, 5, 6, 8), torch.randn(2, 9, 64), [torch.tensor([3.0, 3.0])])

        def save(scale, file=f"{folder}/wan.safetensors"):
            if rank == 0:
                os.makedirs(os.path.dirname(file), exist_ok=True)
                save_wan(file, scale)
            dist.barrier()
            torch.manual_seed(2)  # the ranks' inputs must be the same, and one of them has just drawn a model
            files[file] = [os.stat(file).st_size, os.stat(file).st_mtime_ns]

        save(1.0)
        opened("wan", prompt(wan("wan.safetensors")), ["3", 0])
        x = torch.randn(1, 16, 5, 6, 8)
        compare("wan", x, torch.randn(1, 7, 4096), [torch.tensor([0.7])])
        if importlib.util.find_spec("comfy_extras.nodes_bernini"):
            host.models["wan with references"] = host.models["wan"]
            compare(
                "wan with references", x, torch.randn(1, 7, 4096), [torch.tensor([0.7])], torch.randn(1, 16, 1, 4, 6)
            )
        # A noise level for each latent frame, as Wan 2.2 5B has: the modulation differs by token.
        model = host.models["wan"].model
        model.process_timestep = lambda t, **_: t[:, None] * torch.linspace(0.5, 1.0, 5)
        host.models["wan by frame"] = host.models["wan"]
        compare("wan by frame", x, torch.randn(1, 7, 4096), [torch.tensor([0.7])])
        opened("wan", prompt(wan("wan.safetensors")), ["3", 0])
        facts["mean weight"] = {"wan": mean_weight("wan")}
        save(3.0)
        opened("replaced", prompt(wan("wan.safetensors")), ["3", 0])
        facts["mean weight"]["replaced"] = mean_weight("replaced")
        # The ComfyUI that asks was started anew: with another folder of models, and with options that a worker does not hear.
        save(5.0, f"{folder}/second/wan.safetensors")
        folders = {"diffusion_models": [[f"{folder}/second"], [".safetensors"]]}
        about = {**about, "argv": ["--cpu", "--port", "9000"], "folders": folders}
        opened("replaced", prompt(wan("wan.safetensors")), ["3", 0])
        facts["mean weight"]["of a second ComfyUI"] = mean_weight("replaced")
        facts["others"] = {}
        for name, value in (
            ("argv", ["--bf16-unet", "--fp16-vae"]),
            ("root", f"{folder}/elsewhere"),
            ("version", "9.9"),
        ):
            try:
                host.open({"key": "replaced", "keep": ["replaced"], "comfyui": {**about, name: value}})
            except ValueError as error:
                facts["others"][name] = str(error)
        wrong = {
            "missing": prompt({"class_type": "NoSuchNode", "inputs": {}}),
            "invalid": prompt(wan("gone.safetensors")),
        }
        for name, graph in wrong.items():
            try:
                opened(name, graph, ["3", 0])
            except ValueError as error:
                facts[name] = str(error)
        try:
            opened_from(folder)
        except ValueError as error:
            facts["another folder"] = str(error)
        try:
            opened_from(f"{PACK}/nodes", "EVDiTTilePlan")
        except ValueError as error:
            facts["another copy"] = str(error)
        try:
            host.comfyui.load_packs({}, {PACK: "old code"})
            host.comfyui.load_packs({}, {PACK: "new code"})
        except ValueError as error:
            facts["other code"] = str(error)
        facts["files read"] = two_experts()
    facts["assets"] = [None] * RANKS
    keeper = getattr(host.comfyui.executor.server, "asset_manager", None)
    dist.all_gather_object(facts["assets"], keeper is not None and not keeper.enabled)
    if rank == 0:
        print(json.dumps(facts))


def main():
    with tempfile.TemporaryDirectory() as folder:
        started = [subprocess.Popen([sys.executable, __file__, str(rank), folder]) for rank in range(RANKS)]
        sys.exit(max(process.wait() for process in started))


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main()
