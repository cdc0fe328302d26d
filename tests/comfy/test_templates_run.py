"""The templates of models that are downloaded, run to the end on tiny random ones: every link, widget and schedule holds,
and sparse attention meets the calls that it should, stage by stage.

Kept from a template are its graph, its frames, steps and plans; its pictures are small, its text encoders stand-ins.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from comfyui_server import Server
from templates import PATHS, prompt, workflow

SIZES = {"EmptyLTXVLatentVideo": (128, 64)}  # its latents' side is 32 pixels, the others' 8 or 16
TEXT_WIDTHS = {"wan": 4096, "ltxv": 64, "minimax": 32, "hunyuan_video": 32}


@dataclass(frozen=True)
class Stage:
    """One run of a sampler on a tiny model, one evaluation a step.

    Attributes:
        steps: of the sampler.
        dense: steps before the window.
        sparse: layers that the plan and the node leave sparse, of ``layers``.
        beside: calls of one evaluation that are not over the video.
    """

    steps: int
    dense: int
    sparse: int
    layers: int
    beside: dict[str, int]

    def counts(self) -> dict[str, int]:
        """As the line in the log has them."""
        inside = self.steps - self.dense
        found = {"sparse": inside * self.sparse, "full in the plan": inside * (self.layers - self.sparse)}
        found |= {reason: self.steps * calls for reason, calls in self.beside.items()}
        found["outside the step window"] = self.dense * self.layers
        return {reason: calls for reason, calls in found.items() if calls}


def minimax_h3(steps: int) -> Stage:
    return Stage(steps, 1, 3, 6, {})


def ltx(steps: int, dense: int) -> Stage:
    """A layer's audio has attention of its own, and four calls cross streams or text."""
    return Stage(steps, dense, 3, 6, {"cross-attention": 24, "text or audio alone": 6})


def wan(steps: int, dense: int, sparse: int) -> Stage:
    return Stage(steps, dense, sparse, 8, {"cross-attention": 8})


# The first step of a clip stays dense, and none of a second stage. Every plan leaves the first two layers and the last dense;
# Wan's high-noise expert all of its eight but the seventh.
EXPECTED = {
    "minimax_h3_text_8_steps": [minimax_h3(8)],
    "minimax_h3_image_4_steps": [minimax_h3(4)],
    "ltx23_two_stages": [ltx(8, 1), ltx(3, 0)],
    "ltx25_two_stages": [ltx(8, 1), ltx(3, 0)],
    "wan22_image_4_steps": [wan(2, 1, 1), wan(2, 0, 5)],
    "wan22_sparse_4_steps": [wan(2, 1, 1), wan(2, 0, 5)],
    "wan21_sparse_4_steps": [wan(4, 0, 5)],
    "hunyuan_video_sparse": [Stage(20, 2, 3, 6, {"text or audio alone": 2})],
}


def test_every_template_of_stock_models_is_here():
    assert sorted(EXPECTED) == sorted(name for name in PATHS if not name.startswith(("tiny", "opensora")))


@pytest.fixture(scope="module")
def tiny_server(in_process, tmp_path_factory):
    """A ComfyUI that finds a tiny model under the name of each file of the templates that it can run."""
    base = tmp_path_factory.mktemp("templates")
    shutil.copytree(Path(__file__).parent / "stand_ins", base / "custom_nodes" / "stand-ins")
    running = Server(base)
    try:
        whole = [workflow(name) for name in EXPECTED if not _too_old(running, name)]
        files = {base / "models" / model["directory"] / model["name"] for graph in whole for model in _models(graph)}
        (base / "files.json").write_text(json.dumps(sorted(map(str, files))))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EVDIT_FILES", str(base / "files.json"))
            in_process("template_files")
        yield running
    finally:
        running.stop()
        shutil.rmtree(base / "models", ignore_errors=True)


def _too_old(server, name: str) -> str:
    """Why this ComfyUI cannot run a template, by the version that its note asks for; "" where it can."""
    (needs,) = set(re.findall(r"Needs ComfyUI ([0-9.]+) or newer", json.dumps(workflow(name))))
    version = server.get("/system_stats")["system"]["comfyui_version"]
    asked, here = ([int(part) for part in text.split(".")[:3]] for text in (needs, version))
    return f"the template needs ComfyUI {needs}, this is {version}" if here < asked else ""


def _models(graph: dict) -> list[dict]:
    return [model for node in graph["nodes"] for model in node.get("properties", {}).get("models", [])]


def _tiny(sent: dict) -> dict:
    """The template's graph with small pictures, stand-ins for what has one size only, and sparse though it is slow
    here."""
    for node in sent.values():
        kind, inputs = node["class_type"], node["inputs"]
        if "width" in inputs:
            inputs["width"], inputs["height"] = SIZES.get(kind, (64, 64))
        if kind == "EVDiTSparseAttention":
            inputs["decline_slow"] = False
        if kind in ("CLIPLoader", "DualCLIPLoader", "LTXAVTextEncoderLoader"):
            node.update(class_type="StandInTextEncoder", inputs={"width": TEXT_WIDTHS[inputs.get("type", "ltxv")]})
        if kind == "VAELoader":
            node.update(_vae(inputs["vae_name"]))
    return sent


def _vae(name: str) -> dict:
    if name.startswith("minimax_h3_audio"):
        return {"class_type": "StandInSoundVAE", "inputs": {}}
    if name.startswith("minimax_h3"):
        return {"class_type": "StandInVideoVAE", "inputs": {"channels": 24, "side": 16, "chunked": True}}
    if name.startswith("hunyuan"):
        return {"class_type": "StandInVideoVAE", "inputs": {"channels": 16, "side": 8, "chunked": False}}
    return {}


def _counts(sparse: str, dense: str) -> dict[str, int]:
    return {"sparse": int(sparse), **{reason: int(calls) for calls, reason in re.findall(r"(\d+) ([a-z -]+)", dense)}}


@pytest.mark.parametrize("name", EXPECTED)
def test_it_runs_to_the_end(tiny_server, name):
    if _too_old(tiny_server, name):
        pytest.skip(_too_old(tiny_server, name))
    sent = _tiny(prompt(name))
    before = len(tiny_server.text())
    entry = tiny_server.run(sent)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (saved,) = (entry["outputs"][key] for key, node in sent.items() if node["class_type"] == "SaveVideo")
    assert saved["images"]
    said = tiny_server.text()[before:]
    assert "lora key not loaded" not in said
    reports = re.findall(r"Efficient-vDiT: (\d+) attention calls sparse.*dense: (.*)", said)
    assert [_counts(*report) for report in reports] == [stage.counts() for stage in EXPECTED[name]]
