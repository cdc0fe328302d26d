"""Paired metrics against scikit-image's figures, against the formulas written out, and against cases known by hand."""

import math
import sys
import types

import numpy as np
import pytest
import torch

from efficient_vdit_core.quality import compare_clips, comparison_picture, metrics_table
from efficient_vdit_core.quality.metrics import ssim
from efficient_vdit_core.quality.picture import _heat
from efficient_vdit_core.quality.table import decibels, label

LENGTH, HEIGHT, WIDTH = 3, 24, 37


def waves(shift: float) -> np.ndarray:
    """(3, 24, 37, 3) float64: moving, and different in each channel."""
    t, y, x, c = np.meshgrid(*map(np.arange, (LENGTH, HEIGHT, WIDTH, 3)), indexing="ij")
    return 0.5 + 0.4 * np.sin(0.31 * x + 0.17 * y * (c + 1) + 0.9 * t + shift) * np.cos(0.23 * y - 0.11 * x * c)


@pytest.fixture(scope="module")
def comparison():
    return compare_clips(torch.from_numpy(waves(0.0)), torch.from_numpy(waves(0.35)), lpips=False)


def grey(*levels: float, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """A clip of frames of one level each."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, *size, 3)


def test_the_figures_are_those_of_scikit_image(comparison):
    """scikit-image 0.26.0: peak_signal_noise_ratio, and structural_similarity with gaussian_weights, sigma 1.5."""
    assert comparison.ssim_frames == pytest.approx(
        (0.9241302028868564, 0.9267344701300845, 0.9260536901840671), abs=2e-6
    )
    assert comparison.psnr_frames == pytest.approx(
        (23.220228612610608, 23.245913596573562, 23.19665769547731), abs=1e-4
    )
    assert comparison.psnr == pytest.approx(23.22088672351458, abs=1e-4)
    assert comparison.temporal_psnr == pytest.approx(24.406751034997857, abs=1e-4)
    assert comparison.motion_a == pytest.approx(0.13901689959264013, abs=1e-6)
    assert comparison.motion_b == pytest.approx(0.13918401791112475, abs=1e-6)
    assert comparison.motion_ratio == pytest.approx(comparison.motion_b / comparison.motion_a)
    assert comparison.ssim == pytest.approx(np.mean(comparison.ssim_frames))


def test_ssim_is_the_formula_in_every_window():
    """Wang et al. 2004, equations 13 to 16, as loops over windows and channels."""
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 13, 12, 3))
    gauss = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(gauss, gauss) / gauss.sum() ** 2
    values = []
    for top, left, channel in np.ndindex(3, 2, 3):
        p, q = (frame[top : top + 11, left : left + 11, channel] for frame in (x, y))
        mp, mq = (weights * p).sum(), (weights * q).sum()
        vp, vq, cov = (
            (weights * (p - mp) ** 2).sum(),
            (weights * (q - mq) ** 2).sum(),
            (weights * (p - mp) * (q - mq)).sum(),
        )
        values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert ssim(torch.from_numpy(x).float(), torch.from_numpy(y).float()) == pytest.approx(np.mean(values), abs=1e-5)


def test_an_error_of_a_tenth_is_20_db():
    found = compare_clips(grey(0.2, 0.2, 0.2), grey(0.3, 0.3, 0.3))
    assert found.psnr == pytest.approx(20, abs=1e-4)
    assert found.temporal_psnr == math.inf, "a constant error does not move"
    assert found.motion_ratio is None and found.motion_a == 0
    expected = (2 * 0.2 * 0.3 + 1e-4) / (0.2**2 + 0.3**2 + 1e-4)  # flat windows: luminance alone
    assert found.ssim == pytest.approx(expected, abs=1e-4)


def test_flicker_shows_in_the_changes_and_the_motion():
    found = compare_clips(grey(0.5, 0.6, 0.7), grey(0.5, 0.8, 0.5))
    assert found.motion_a == pytest.approx(0.1) and found.motion_b == pytest.approx(0.3)
    assert found.motion_ratio == pytest.approx(3.0, rel=1e-4)
    assert found.temporal_psnr == pytest.approx(-10 * math.log10((0.2**2 + 0.4**2) / 2), abs=1e-4)
    assert found.psnr == pytest.approx(-10 * math.log10((0 + 0.2**2 + 0.2**2) / 3), abs=1e-4)


def test_the_psnr_of_a_clip_is_of_its_mean_error_not_the_mean_of_its_frames():
    found = compare_clips(grey(0.5, 0.5), grey(0.5, 0.6))
    assert found.psnr_frames[0] == math.inf and found.psnr == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_identical_clips_and_json():
    clip = torch.from_numpy(waves(0.0))
    found = compare_clips(clip, clip.clone(), lpips=False)
    assert (found.psnr, found.ssim, found.motion_ratio) == (math.inf, pytest.approx(1.0), 1.0)
    values = found.to_dict()
    assert values["identical"] and values["psnr"] is None and values["psnr_frames"] == [None] * 3
    assert "identical" in metrics_table(found)


def test_bytes_and_floats_are_the_same_clip():
    bytes_ = torch.from_numpy((waves(0.0) * 255).round().astype(np.uint8))
    assert compare_clips(bytes_, bytes_.float() / 255).psnr > 140  # nothing but the rounding of float32


def test_values_beyond_the_screen_are_clipped():
    assert compare_clips(grey(1.0), grey(1.7)).psnr == math.inf


def test_one_frame_has_no_motion():
    found = compare_clips(grey(0.1), grey(0.2))
    assert (found.temporal_psnr, found.motion_a, found.motion_ratio) == (None, None, None)
    assert "1 frame," in metrics_table(found)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (grey(0.1, 0.2), grey(0.1, 0.2, 0.3), ["2 frames", "3", "cut"]),
        (grey(0.1, size=(16, 20)), grey(0.1, size=(20, 16)), ["20x16", "16x20"]),
        (grey(0.1)[:0], grey(0.1)[:0], ["first", "(0, 16, 16, 3)"]),
        (grey(0.1), grey(0.1)[0], ["second", "(16, 16, 3)"]),
        (grey(0.1, size=(10, 30)), grey(0.1, size=(10, 30)), ["30x10", "11"]),
        (grey(0.1, 0.2), grey(0.1, math.nan), ["Frame 1", "second", "NaN"]),
        (grey(0.1, math.inf), grey(0.1, 0.2), ["Frame 1", "first"]),
        (grey(0.1).expand(-1, -1, -1, 3)[..., :1], grey(0.1), ["(1, 16, 16, 1)"]),
    ],
    ids=["lengths", "sizes", "empty", "no video", "small", "nan", "inf", "channels"],
)
def test_clips_that_are_no_pair_are_refused(a, b, words):
    with pytest.raises(ValueError) as error:
        compare_clips(a, b)
    assert [word for word in words if word not in str(error.value)] == [], error.value


def test_progress_is_told_and_can_stop():
    told = []
    compare_clips(grey(0.1, 0.2, 0.3), grey(0.1, 0.2, 0.3), progress=lambda *x: told.append(x))
    assert told == [(1, 3), (2, 3), (3, 3)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_clips(grey(0.1, 0.2), grey(0.1, 0.2), progress=stop)


@pytest.fixture
def fake_lpips(monkeypatch, tmp_path):
    """The package's interface, with a distance that can be foretold; weights_are_there() puts AlexNet's file in its
    place."""
    seen = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            seen.append(net)

        def forward(self, x, y):
            seen.append((x.shape, float(x.min()), float(y.max())))
            return (x - y).abs().mean().view(1, 1, 1, 1)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return seen, lambda: (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()


def test_lpips_sees_pictures_in_minus_one_to_one(fake_lpips):
    seen, weights_are_there = fake_lpips
    weights_are_there()
    found = compare_clips(grey(0.0, 0.0), grey(0.25, 1.0))
    assert seen == ["alex", ((1, 3, 16, 16), -1.0, -0.5), ((1, 3, 16, 16), -1.0, 1.0)]
    assert found.lpips == pytest.approx((0.5 + 2.0) / 2) and found.lpips_note == "AlexNet"


def test_lpips_is_left_out_with_a_reason_and_never_downloads(fake_lpips, monkeypatch):
    seen, _ = fake_lpips
    found = compare_clips(grey(0.0), grey(0.1))
    assert found.lpips is None and "alexnet-owt-7be5be79.pth" in found.lpips_note and seen == []
    monkeypatch.setitem(sys.modules, "lpips", None)
    found = compare_clips(grey(0.0), grey(0.1))
    assert found.lpips is None and "not installed" in found.lpips_note and found.lpips_note in metrics_table(found)


@pytest.mark.parametrize("size", [(11, 64), (64, 11), (40, 72)])
@pytest.mark.parametrize("length", [1, 2, 29])
def test_the_picture_shows_both_clips_and_where_they_differ(size, length):
    a, b = grey(*[0.2] * length, size=size), grey(*[0.2] * length, size=size).clone()
    b[:, :, size[1] // 2 :] = 0.45  # a quarter of full range, four times amplified
    picture = comparison_picture(a, b, compare_clips(a, b, lpips=False), frames=4, names=("first", "x" * 200))
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == torch.float32
    assert 0 <= float(picture.min()) and float(picture.max()) <= 1

    def share(level):
        return float(((picture - torch.tensor(level)).abs().amax(-1) < 0.01).float().mean())

    assert share((0.2, 0.2, 0.2)) > 1.9 * share((0.45, 0.45, 0.45)) > 0  # a whole, and half of b
    assert share((1.0, 1.0, 220 / 255)) > 0.8 * share((0.45, 0.45, 0.45))  # the amplified difference


def test_black_against_white_is_nought_decibels():
    assert decibels(compare_clips(grey(0.0), grey(1.0), lpips=False).psnr) == "0.00 dB"


def test_frames_that_differ_by_rounding_alone_are_drawn_beside_others():
    a = grey(0.2, 0.2, 0.0)
    b = a.clone()
    b[1] += 0.1
    b[2, 0, 0, 0] = 1e-30
    comparison = compare_clips(a, b, lpips=False)
    assert comparison.psnr_frames[2] > 600
    assert comparison_picture(a, b, comparison).ndim == 3


def test_the_heat_scale_rises_in_brightness():
    brightness = _heat(torch.linspace(0, 1, 50)[None])[0] @ torch.tensor([0.299, 0.587, 0.114])
    assert bool((brightness.diff() > 0).all())


@pytest.mark.parametrize(
    ("choice", "words"), [({"frames": 0}, "1 to 12"), ({"frames": 13}, "13"), ({"amplify": 0.0}, "amplify")]
)
def test_a_picture_that_cannot_be_drawn_is_refused(choice, words):
    with pytest.raises(ValueError, match=words):
        comparison_picture(grey(0.1), grey(0.2), compare_clips(grey(0.1), grey(0.2)), **choice)


@pytest.mark.parametrize("name", ["x" * 5000, "two\nlines", "\x1b[31mred", "\ud800", "视频" * 3000], ids=range(5))
def test_a_label_is_one_short_printable_line(name):
    clip = torch.rand(2, 12, 12, 3, generator=torch.Generator().manual_seed(0))
    comparison = compare_clips(clip, clip, lpips=False)
    assert comparison_picture(clip, clip, comparison, names=(name, "b")).ndim == 3
    first, *_ = metrics_table(comparison, name, "b").splitlines()
    assert len(first) < 120 and first.isprintable() and len(label(name)) <= 60
