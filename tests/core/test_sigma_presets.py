"""The published few-step levels, against the figures in their sources."""

import pytest
import torch

from efficient_vdit_core.sampling.presets import PRESETS, cut, parse_sigmas, preset_of, shifted


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("LightX2V 4 steps", [1, 0.9375, 0.83333, 0.625, 0]),
        ("LightX2V 8 steps", [1, 0.9722, 0.9375, 0.8929, 0.8333, 0.750, 0.625, 0.4167, 0]),
        ("FastWan 3 steps", [1, 0.757, 0.522, 0]),
        ("rCM 4 steps", [0.9877, 0.9338, 0.8529, 0.609, 0]),
        ("rCM 2 steps", [0.9877, 0.9338, 0]),
        ("LTX distilled 8 steps", [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]),
    ],
)
def test_presets_are_the_published_levels(name, published):
    assert PRESETS[name].sigmas == pytest.approx(published, abs=6e-5)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_descends_to_zero_and_has_its_steps(preset):
    assert list(preset.sigmas) == sorted(preset.sigmas, reverse=True) and preset.sigmas[-1] == 0
    assert 0.0 <= preset.gamma <= 1.0
    name = next(n for n, p in PRESETS.items() if p is preset)
    assert f" {len(preset.sigmas) - 1} step" in name


def test_a_preset_is_known_by_its_levels():
    for name, preset in PRESETS.items():
        assert preset_of(torch.tensor(preset.sigmas).tolist()) == name
    assert preset_of(PRESETS["rCM 4 steps"].sigmas[1:4]) == "rCM 4 steps", "as one expert has them"
    assert preset_of((1.0, 0.5, 0.0)) is None and preset_of(shifted(4, 8.0)) is None


def test_shift_one_is_even():
    assert shifted(4, 1.0) == (1.0, 0.75, 0.5, 0.25, 0.0)
    with pytest.raises(ValueError, match="shift"):
        shifted(4, 0.0)


def test_manual_levels():
    assert parse_sigmas("1, 0.5 0.25,0").tolist() == [1.0, 0.5, 0.25, 0.0]
    assert parse_sigmas("14.6 2").tolist() == pytest.approx([14.6, 2.0])
    for wrong in ("", "1", "1 x", "1 1 0", "0 1", "1 -1", "nan 0", "inf 1 0"):
        with pytest.raises(ValueError, match="sigmas"):
            parse_sigmas(wrong)


def test_two_experts_share_the_steps():
    sigmas = torch.tensor(PRESETS["LightX2V 4 steps"].sigmas)
    first, second = cut(sigmas, 0, 2), cut(sigmas, 2, 1000)
    assert first[-1] == second[0] and torch.equal(torch.cat([first, second[1:]]), sigmas)
    for start, end in ((2, 2), (4, 1000), (3, 1)):
        with pytest.raises(ValueError, match="no step is left"):
            cut(sigmas, start, end)
