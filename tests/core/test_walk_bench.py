"""The bench that says how fine a teacher must walk, on data whose way is known."""

import json

import pytest
import torch

from efficient_vdit_core.bench import walk
from efficient_vdit_core.cli import main
from efficient_vdit_core.distill.config import DistillConfig
from efficient_vdit_core.distill.data.noise import numbered_noise
from efficient_vdit_core.sampling.path import VPPath, ddim_step, predict_x0
from efficient_vdit_core.sampling.schedule import segment_edges

SHAPE, VARIANCE = (2, 3, 4, 4), 0.3


class GaussianModel:
    """E[x | z] of data of one variance about the caption's number, by v; without words about 0."""

    path, prediction, guided, at_once, text_padding = VPPath(), "v_prediction", True, 2, 0

    def __init__(self):
        self.read = []

    def size(self, *asked):
        return asked

    def latent_shape(self, size):
        return SHAPE

    def text_encoder(self, device):
        def encode(texts):
            self.read += texts
            return torch.tensor([[[float(t or 0)]] for t in texts]), torch.ones(len(texts), 1)

        return encode

    def load(self):
        return torch.nn.Linear(1, 1)

    def predict(self, module, z, time, condition, options=None):
        a, s = (c.to(z).view(-1, 1, 1, 1, 1) for c in self.path.coefficients(time))
        about = condition[0].view(-1, 1, 1, 1, 1).to(z)
        x = about + (z - a * about) * a * VARIANCE / (a**2 * VARIANCE + s**2)
        return (a * z - x) / s


def steps_down(model, z, condition, negative, guidance, times):
    """DDIM one by one, in float64."""
    a, s = model.path.coefficients(times)
    for i in range(len(times) - 1):
        here = times[i : i + 1].expand(len(z))
        out, without = (model.predict(None, z, here, (c, None)) for c in (condition, negative))
        x = predict_x0("v_prediction", z, without + guidance * (out - without), a[i], s[i])
        z = ddim_step(z, x, a[i], s[i], a[i + 1], s[i + 1])
    return z


def config_of(tmp_path, guidance=2.0):
    (tmp_path / "captions.txt").write_text("1\n-2\n")
    return DistillConfig.from_dict({
        "method": "consistency", "data": {"source": "captions", "captions": str(tmp_path / "captions.txt")},
        "objective": {"segments": 3, "guidance": guidance},
    })  # fmt: skip


@pytest.mark.parametrize("guidance", [2.0, [1.0, 2.0]])
def test_what_coarse_steps_cost_is_their_distance_to_the_fine_way(monkeypatch, tmp_path, guidance):
    """Three clips of two captions, two at once; against steps taken one by one and the exact way."""
    model = GaussianModel()
    monkeypatch.setattr(walk, "open_model", lambda asked: model)
    rows = list(
        walk.measure(config_of(tmp_path, guidance), torch.device("cpu"), clips=3, steps=(7, 12), fine=300, seed=4)
    )
    assert [(row["order"], row["steps"], row["fine"]) for row in rows] == [
        (1, 6, 300),
        (1, 12, 300),
        (2, 6, 300),
        (2, 12, 300),
    ]
    noise = torch.stack([numbered_noise(SHAPE, "samples", n, 4) for n in range(3)]).double()
    words = torch.tensor([1.0, -2.0, 1.0]).double()
    a, s = (c.view(-1, 1, 1, 1, 1, 1) for c in model.path.coefficients(segment_edges(3)))
    # Guidance of 2 is data about twice the words' number; each z keeps its place in the deviation about that.
    about, spread = a * 2 * words.view(-1, 1, 1, 1, 1), torch.sqrt(a**2 * VARIANCE + s**2)
    edges = about + spread * (noise - about[0]) / spread[0]
    asked = (words, torch.zeros(3).double(), 2.0)
    for row in rows[:2]:
        per, times = row["steps"] // 3, segment_edges(3, row["steps"])
        landed = [steps_down(model, edges[k], *asked, times[k * per : (k + 1) * per + 1]) for k in range(3)]
        landed.append(steps_down(model, noise, *asked, times))
        away = [
            float((z - e).square().mean().sqrt() / edges[-1].std())
            for z, e in zip(landed, [*edges[1:], edges[-1]], strict=True)
        ]
        assert [*row["ends"], row["clip"]] == pytest.approx(away, rel=0.05)
    assert all(second["clip"] < 0.6 * first["clip"] for first, second in zip(rows[:2], rows[2:], strict=True))
    assert max(rows[3]["ends"][:2]) < 0.5 * max(rows[1]["ends"][:2])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"expert": "high"}}, r"model\.expert is high, one of two networks"),
        ({"model": {"host_teacher": True}}, r"model\.host_teacher is set"),
        ({"method": "knowledge", "objective": {"plan": "1:3"}}, r"for method knowledge, where no teacher walks"),
        (
            {"objective": {"segments": 4}},
            r"The fine way has 192 steps, expected more than the 192 .* multiples of the 4 segments",
        ),
    ],
)
def test_what_cannot_be_walked_is_refused_before_a_model_is_opened(monkeypatch, changes, told):
    monkeypatch.setattr(walk, "open_model", lambda asked: pytest.fail("opened"))
    config = DistillConfig.from_dict({"method": "consistency", **changes})
    with pytest.raises(ValueError, match=told):
        next(walk.measure(config, torch.device("cpu"), clips=1, steps=(16, 191), fine=192))


def test_weights_with_guidance_inside_are_asked_for_none(monkeypatch, tmp_path):
    monkeypatch.setattr(GaussianModel, "guided", False)
    monkeypatch.setattr(walk, "open_model", lambda asked: GaussianModel())
    with pytest.raises(ValueError, match="guidance is 2.0, but this model's weights have guidance inside"):
        next(walk.measure(config_of(tmp_path), torch.device("cpu"), clips=1, steps=(3,), fine=6))


def test_captions_lie_beside_videos_too_and_no_more_are_encoded_than_there_are_clips(monkeypatch, tmp_path):
    for name in "123":
        (tmp_path / f"{name}.mp4").write_bytes(b"")
        (tmp_path / f"{name}.txt").write_text(name)
    model = GaussianModel()
    monkeypatch.setattr(walk, "open_model", lambda asked: model)
    data = {"source": "videos", "folder": str(tmp_path)}
    config = DistillConfig.from_dict({"method": "consistency", "data": data, "objective": {"segments": 2}})
    assert len(list(walk.measure(config, torch.device("cpu"), clips=2, steps=(2,), fine=4))) == 2
    assert sorted(model.read) == ["", "1", "2"]


def test_one_step_a_segment_is_of_one_order(monkeypatch, tmp_path):
    monkeypatch.setattr(walk, "open_model", lambda asked: GaussianModel())
    first, second = walk.measure(config_of(tmp_path), torch.device("cpu"), clips=1, steps=(3,), fine=60)
    assert first["ends"] == second["ends"] and first["clip"] > second["clip"]


def test_the_command_takes_the_settings_of_a_training(monkeypatch, tmp_path, capsys):
    seen, model = [], GaussianModel()
    monkeypatch.setattr(walk, "open_model", lambda asked: seen.append(asked) or model)
    config_of(tmp_path).save(tmp_path / "my.toml")
    out = tmp_path / "walk.json"
    asked = ["--config", str(tmp_path / "my.toml"), "--steps", "6", "--fine", "30", "--clips", "2", "--seed", "3"]
    assert main(["bench", "walk", *asked, "--device", "cpu", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["seed"] == 3 and [(row["order"], row["segments"], row["clips"]) for row in found["rows"]] == [
        (1, 3, 2),
        (2, 3, 2),
    ]
    assert seen[0].path == "tiny"
    assert f"{found['rows'][1]['clip']:.4f}" in capsys.readouterr().out


def test_the_fine_way_is_finer_than_what_is_compared_with_it(capsys):
    assert main(["bench", "walk", "--steps", "16", "48", "--fine", "48"]) == 2
    assert "The fine way has 48 steps, expected more than the 48 that are compared with it" in capsys.readouterr().err


def test_without_settings_it_is_the_tiny_model(capsys):
    assert main(["bench", "walk", "--clips", "1", "--steps", "4", "--fine", "8", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["1", "4"], ["2", "4"]] and len(lines[1].split()) == 7
