"""One function a kind: writes its files into the folder, and returns what is to be called with them.

Long work that a valid case would start ends in ``Reached``: it was let in, and that is all that is asked here.
"""

import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from efficient_vdit_core import assets
from efficient_vdit_core.distill.config import DistillConfig, read_section, read_toml
from efficient_vdit_core.distill.runs.recipe import RecipeConfig, ThreeStages
from efficient_vdit_core.models.distilled import read_metadata as distilled_metadata
from efficient_vdit_core.models.opensora_plan.captions import clean_caption
from efficient_vdit_core.models.opensora_plan.checkpoint import read_transformer, read_vae
from efficient_vdit_core.models.opensora_plan.text import TextEncoder
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.text import parse_layers
from efficient_vdit_core.quality.table import label
from efficient_vdit_core.sampling.presets import parse_sigmas
from efficient_vdit_core.search import parse_candidates
from efficient_vdit_core.storage.weight_files import read_state_dict
from efficient_vdit_core.tinyworld.tables.stages import TableConfig
from efficient_vdit_core.training.checkpoint import read_checkpoint

from . import odd
from .command import Call, Reached, evdit
from .media import clips, media

Random = random.Random


def warm_up() -> None:
    """What costs seconds once, and the work that no case does."""
    from efficient_vdit_core.bench import attention, mixture, overhead, parallel, step
    from efficient_vdit_core.commands import workers
    from efficient_vdit_core.distill.runs import recipe, trainer
    from efficient_vdit_core.pipeline import Pipeline
    from efficient_vdit_core.tinyworld.tables import stages
    from efficient_vdit_core.tinyworld.train.recipe import TinyRecipe

    def stop(*_: Any, **__: Any) -> Any:
        raise Reached

    for module in (attention, overhead, parallel, step):
        module.measure = stop
    mixture.run = stop
    Pipeline.from_model = stop  # pyright: ignore[reportAttributeAccessIssue]
    trainer.prepare_data = recipe.distill = stop
    TinyRecipe.train = stop  # pyright: ignore[reportAttributeAccessIssue]
    ThreeStages.plans = stages.TinyTable.measure = stages.TinyTable.bounds = stop  # pyright: ignore[reportAttributeAccessIssue]
    workers._keep_running = stop
    tiny_parts()
    clips()
    tokenizer()


@cache
def tiny_parts() -> dict[str, bytes]:
    return {part: next(assets.tiny_path(part).glob("*.safetensors")).read_bytes() for part in assets.TINY_PARTS} | {
        "distilled": next(assets.tiny_path("transformer", "tiny-8-steps-sparse").glob("*.safetensors")).read_bytes()
    }


def plan_file(rng: Random, folder: Path) -> Call:
    """Plans: read as files, checked, written again."""
    base = json.loads(assets.preset_path(rng.choice(assets.preset_names())).read_text(encoding="utf-8"))
    base["family"] = rng.choice([base["family"], "any", "opensora_plan"])
    if rng.random() < 0.3:
        base["reference_frames"] = [rng.choice([None, 1, 2]) for _ in range(rng.choice([1, 6, 40, 1025]))]
    if rng.random() < 0.1:
        base["dense_layers"] = [[0, 0]] * rng.choice([10, 2000, 50_000])
    (folder / "plan.json").write_text(odd.as_json(rng, odd.spoil(rng, base)), encoding="utf-8", errors="surrogatepass")

    def call() -> None:
        plan = TilePlan.load(folder / "plan.json")
        plan.check_fits(family="opensora_plan", layers=6, heads=4)
        _ = plan.with_dense("0-2,-1").density(8, 6), plan.to_text(), plan.to_json()

    return call


WORDS = [
    "all:2",
    "0:full",
    "1-4:2:6",
    "-1:full",
    "0-5:2",
    "5:99999",
    "9999-1:1",
    "0-1023:1:7",
    "1",
    "2",
    "4",
    "0",
    "-1",
    "0.5",
    "1e400",
    "nan",
]


def plan_text(rng: Random, folder: Path) -> Call:
    """One-line texts of widgets and options."""
    parts = [rng.choice(WORDS) if rng.random() < 0.8 else odd.text(rng) for _ in range(rng.randint(1, 3))]
    joined = rng.choice([" ", ",", ", ", " " * 50_000, ""]).join(parts)
    read = rng.choice([TilePlan.from_text, parse_layers, parse_candidates, parse_sigmas])
    return lambda: read(joined)


def prompt(rng: Random, folder: Path) -> Call:
    """Prompts and names of clips."""
    said = odd.text(rng) + odd.text(rng)
    encoder = tokenizer()
    return rng.choice(
        [lambda: clean_caption(clean_caption(said)), lambda: encoder.tokenize([said]), lambda: label(said)]
    )


@cache
def tokenizer() -> TextEncoder:
    return TextEncoder.from_folder(assets.tiny_path("text_encoder"))


def recipe(rng: Random, folder: Path) -> Call:
    """Recipes and configurations: read, and checked to their end."""
    values = read_toml(assets.recipe_path(rng.choice(["tiny", "three_stage"])))
    if "path" in values.get("model", {}):
        values["model"]["path"] = "tiny"
    values["data"] = {**values.get("data", {}), "source": "tinyworld"}
    text = odd.as_toml(rng, odd.spoil(rng, values))
    file = folder / "recipe.toml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    if rng.random() < 0.3:
        command = rng.choice(["three-stage", "tiny-table"])
        return evdit("recipe", command, "--config", str(file), "--out", str(folder / "out"))

    def call() -> None:
        found = read_toml(file)
        table = read_section(TableConfig, found.pop("table", {}), "table")
        config = RecipeConfig.from_dict(found)
        table.check(config)
        ThreeStages(config, folder / "out").check()

    return call


def distillation(rng: Random, folder: Path) -> Call:
    """A single stage's configuration, and settings on the command line."""
    method = rng.choice(["consistency", "knowledge"])
    base = DistillConfig.from_dict(
        {"method": method, "objective": {"plan": "1:7"} if method == "knowledge" else {}}
    ).to_dict()
    file = folder / "run.toml"
    if rng.random() < 0.6:
        file.write_text(odd.as_toml(rng, odd.spoil(rng, base)), encoding="utf-8", errors="surrogatepass")
        return evdit("distill", method, "--config", str(file), "--out", str(folder / "out"))
    section, name = rng.choice([(s, n) for s, table in base.items() if isinstance(table, dict) for n in table])
    setting = f"{rng.choice([section, section, odd.text(rng)])}.{name}={rng.choice([odd.value(rng), odd.text(rng)])}"
    return evdit("distill", method, "--out", str(folder / "out"), "--set", setting[:200_000])


def checkpoint(rng: Random, folder: Path) -> Call:
    """safetensors of the tiny model: bytes, header, configuration, shapes, types and values."""
    part = rng.choice(list(tiny_parts()))
    data, kind = tiny_parts()[part], "transformer" if part == "distilled" else part
    file = folder / "diffusion_pytorch_model.safetensors"
    way = rng.random()
    if way < 0.25:
        file.write_bytes(odd.bruise(rng, data))
    else:
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        names = [name for name in header if name != "__metadata__"]
        if way < 0.6:
            key = rng.choice([key for key in header["__metadata__"] if key != "format"])
            header["__metadata__"][key] = odd.as_json(rng, odd.spoil(rng, json.loads(header["__metadata__"][key])))
        elif way < 0.75:
            header[rng.choice(["\x1b[31mred", "x" * 3000, "\n", "decoder.x", "blocks.0.self_attn.x"])] = header.pop(
                rng.choice(names)
            )
        elif way < 0.9:
            header[rng.choice(names)].update(
                rng.choice([{"dtype": "BOOL"}, {"dtype": "I32"}, {"shape": [-1]}, {"shape": [2**62, 4]}, {"shape": []}])
            )
        else:
            at = rng.randrange(0, len(body) - 8, 4)
            body = body[:at] + rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f"]) * 2 + body[at + 8 :]
        text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    if rng.random() < 0.2:
        beside = odd.as_json(rng, odd.spoil(rng, {"_class_name": "OpenSoraT2V", "model_type": "mt5", "num_layers": 6}))
        (folder / "config.json").write_text(beside, encoding="utf-8", errors="surrogatepass")
    readers = {"transformer": read_transformer, "vae": read_vae, "text_encoder": TextEncoder.from_folder}
    if part == "distilled" and rng.random() < 0.7:
        return lambda: distilled_metadata(file)
    return lambda: readers[kind](rng.choice([file, folder]))


STATE = {"model": {}, "ema": {}, "optimizers": [], "generator": torch.zeros(5056, dtype=torch.uint8), "step": 1}


def torch_file(rng: Random, folder: Path) -> Call:
    """What torch.save wrote: state dicts, training states, other things."""
    weights = {"a": torch.zeros(2), "b": torch.full((2,), float("nan"))}
    contents: list[Any] = [
        {}, [], None, 3, "x", {"state_dict": None}, {"state_dict": {}}, {"ema_state_dict": weights}, {"state_dict": {"gen_model": []}},
        {"state_dict": weights}, {"a": 1}, {1: torch.zeros(2)}, {**STATE, "generator": torch.zeros(3)},
        {**STATE, "model": weights, "ema": weights, "optimizers": [{}], "step": 10**30},
    ]  # fmt: skip
    whole = io.BytesIO()
    torch.save(rng.choice(contents), whole, _use_new_zipfile_serialization=rng.random() < 0.7)
    data = whole.getvalue()
    file = folder / rng.choice(["checkpoint.ckpt", "checkpoint.pt", "model.bin"])
    file.write_bytes(odd.bruise(rng, data) if rng.random() < 0.4 else data)
    state = lambda: read_checkpoint(file, {"a"}, processes=1, random=5056, mmap=False)  # noqa: E731
    return rng.choice([lambda: read_vae(file), lambda: read_state_dict(file), lambda: read_transformer(file), state])


def shards(rng: Random, folder: Path) -> Call:
    """Indices of shards."""
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    whole = save({"a": torch.zeros(2), "b": torch.ones(2)})
    (folder / "one.safetensors").write_bytes(whole[: rng.choice([10, 100, None])])
    (folder / "two.safetensors").write_bytes(whole)
    text = odd.as_json(rng, odd.spoil(rng, index))
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    return lambda: read_state_dict(folder)


def arguments(rng: Random, folder: Path) -> Call:
    """Command lines: options of the right names with values of any kind."""
    number = lambda: str(rng.choice([*odd.SMALL, *odd.NUMBERS[:20], "x" * 5000, "", "1e9", "1" * 5000, odd.text(rng)]))  # noqa: E731
    plan = rng.choice(["full", "1:7", "9" * 5000 + ":1", "gone.json", odd.text(rng)])
    device = rng.choice(["cpu", "meta", "cuda:99", "xpu", "hpu", "mps", odd.text(rng)])
    asked = odd.text(rng)
    sizes = [word for name in ("--frames", "--width", "--height", "--steps", "--seed", "--guidance") if rng.random() < 0.4
             for word in (name, number())]  # fmt: skip
    lines: list[list[str]] = [
        ["generate", "--prompt", asked, "--out", "a.gif", "--plan", plan, "--device", device, *sizes, "--zoom", number()],
        ["generate", "--prompt", "x", "--out", rng.choice(["a.gif", "猫" * 100 + ".gif", "gone/a.mp4", asked]), "--segments", number()],
        ["generate", "--prompt", "x", "--out", "a.webp", "--frames", number(), "--width", "4096", "--height", "4096"],
        ["search", "--prompt", asked, "--out", "p.json", "--threshold", number(), "--probes", number(), "--candidates", odd.text(rng)],
        ["search", "--prompt", "x", "--out", "p.json", "--speedup", number(), *sizes[:2]],
        ["bench", "parallel", "--depth", number(), "--heads", number(), "--ranks", rng.choice(["1,2", number(), "2,9999"])],
        ["bench", "parallel", "--grid", number(), number(), number()],
        ["bench", "attention", "--heads", number(), "--frames", number(), "--repeats", number()],
        ["bench", "step", "--depth", number(), "--references", number(), "--device", device],
        ["bench", "mixture", "--segments", number(), "--seeds", number()],
        ["bench", "plot", rng.choice(["gone.json", asked, "."])],
        ["workers", "--devices", rng.choice(["cpu,cpu", number(), asked]), "--start-timeout", number()],
        ["tinyworld", rng.choice(["train", "eval", "render"]), "--seed", number()],
        ["tinyworld", "eval", "--captions", number(), "--steps", number(), "--guidance", number()],
        ["tinyworld", "difference", asked, asked],
        ["compare", asked, asked], ["eval", "vbench-layout", asked, "--out", asked], ["convert", "vae", asked, "b.safetensors"],
        ["recipe", "three-stage", "--config", asked, "--out", "out", "--set", asked], [asked], [], ["generate", f"--{asked}"],
    ]  # fmt: skip
    return evdit(*[word.replace("\0", "") for word in rng.choice(lines)])


def results(rng: Random, folder: Path) -> Call:
    """Files that commands read back: results of a bench, prompts of clips."""
    row = {"pattern": "1:7", "ideal_speedup": 2.0, "speedup": 1.5, "tokens_per_frame": 4, "backend": "frames", "heads": 2, "head_dim": 8,
           "dtype": "float32"}  # fmt: skip
    document: Any = {"rows": [row], "machine": {"hardware": "a", "versions": {"torch": "2"}}}
    prompts = rng.random() < 0.5
    document = {"a.mp4": "a cat"} if prompts else document
    (folder / "r.json").write_text(odd.as_json(rng, odd.spoil(rng, document)), encoding="utf-8", errors="surrogatepass")
    if not prompts:
        return evdit("bench", "plot", "r.json")
    (folder / "a.mp4").write_bytes(clips()["moving.mp4"])
    return evdit("eval", "vbench-layout", "a.mp4", "--out", "out", "--prompts", "r.json")


KINDS: dict[str, Callable[[Random, Path], Call]] = {
    f.__name__: f
    for f in (
        plan_file,
        plan_text,
        prompt,
        recipe,
        distillation,
        checkpoint,
        torch_file,
        shards,
        media,
        arguments,
        results,
    )
}
