"""What a training shows of its progress: at the model's speed, and sampled as the student is made for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import cogvideox, opensora_plan, wan, wan_5b

from efficient_vdit_core.distill.config import DataConfig, DistillConfig, TrainingConfig
from efficient_vdit_core.distill.data.clips import ClipSet
from efficient_vdit_core.distill.data.prepare import PreparedData
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.texts import TextBank
from efficient_vdit_core.distill.objectives.consistency import ConsistencyConfig
from efficient_vdit_core.distill.objectives.knowledge import KnowledgeConfig
from efficient_vdit_core.distill.runs.samples import write_samples
from efficient_vdit_core.distill.runs.trainer import describe
from efficient_vdit_core.media import video

KNOWLEDGE = ("knowledge", KnowledgeConfig(plan="1:3", segments=2, steps=2))
CONSISTENCY = ("consistency", ConsistencyConfig(segments=2, teacher_steps=4))


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Makes a run's samples: their frames a second, and the text states that each forward is asked for."""
    rates = []
    monkeypatch.setattr(video, "write_video", lambda file, frames, fps, metadata: rates.append(fps))

    def make(family, objective, about=None, **data):
        asked = []
        model = open_model(family(tmp_path))
        monkeypatch.setattr(model, "video_decoder", lambda device: lambda z: np.zeros((1, 8, 8, 3), np.uint8))
        monkeypatch.setattr(
            model,
            "predict",
            lambda module, z, t, c, options=None: asked.append(float(c[0][0, 0, 0])) or torch.zeros_like(z),
        )
        config = DistillConfig(
            *objective, data=DataConfig(negative="bad", **data), training=TrainingConfig(samples=("a",))
        )
        bank = TextBank({"a": torch.ones(3, 8), "bad": -torch.ones(2, 8)})
        latents = torch.zeros(1, *model.latent_shape(model.size(13, 64, 64)))
        prepared = PreparedData(ClipSet(latents, [("a",)]), bank, "bad", torch.device("cpu"))
        about = replace(describe(config, model), **(about or {}))
        write_samples(config, model, torch.nn.Identity(), prepared, about, tmp_path / "samples")
        return rates, asked

    return make


@pytest.mark.parametrize(("family", "fps"), [(opensora_plan, 24), (wan, 16), (wan_5b, 24), (cogvideox, 8)])
def test_samples_are_shown_at_the_models_speed(shown, family, fps):
    assert shown(family, CONSISTENCY)[0] == [fps]


def test_samples_are_shown_at_the_speed_that_the_data_are_brought_to(shown):
    assert shown(opensora_plan, CONSISTENCY, fps=12.5)[0] == [12.5]


def test_a_student_that_learns_to_be_guided_is_shown_with_guidance(shown):
    assert shown(opensora_plan, KNOWLEDGE, negative_share=0.1)[1] == [1.0, -1.0] * 2


@pytest.mark.parametrize(
    ("objective", "about", "data"),
    [
        (KNOWLEDGE, {}, {}),
        (KNOWLEDGE, {"guidance": 3.0}, {"negative_share": 0.1}),
        (KNOWLEDGE, {}, {"negative_share": 0.1, "guidance": 1.0}),
        (CONSISTENCY, {}, {"negative_share": 0.1}),
    ],
    ids=["without a share", "guidance inside", "none asked", "distilled"],
)
def test_others_are_shown_without_guidance(shown, objective, about, data):
    assert shown(opensora_plan, objective, about, **data)[1] == [1.0] * 2
