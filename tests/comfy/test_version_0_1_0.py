"""A workflow that version 0.1.0 saved, with the inputs that its nodes had: the plan that it searches and what it samples."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "version_0_1_0"


def test_a_saved_workflow_gives_the_same_plan_and_latents(server):
    before = set((server.base / "output").rglob("*.latent"))
    entry = server.run(json.loads((FOLDER / "prompt.json").read_text(encoding="utf-8")))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert entry["outputs"]["4"]["evdit_plan"] == ["0-1:4:4 2-4:2:6 5:4:4"]
    (written,) = set((server.base / "output").rglob("*.latent")) - before
    want = load_file(FOLDER / "latent.safetensors")["latent"]
    # Equal to the bit on the kind of processor that made it; others round otherwise.
    torch.testing.assert_close(load_file(written)["latent_tensor"], want, atol=1e-4 * float(want.abs().max()), rtol=0)
