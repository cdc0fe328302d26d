"""Where the compiled kernels can run: what brings Triton decides, not the operating system."""

import importlib.util
import sys

import pytest
import torch

from efficient_vdit_core.attention import gpu
from efficient_vdit_core.attention.backends import flex


@pytest.fixture
def on_windows(monkeypatch):
    """A Windows machine with an RTX 4090; the argument says whether the package triton is there."""

    def pretend(*, triton: bool) -> None:
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if triton and name == "triton" else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 4090")
        monkeypatch.setattr(torch.version, "hip", None)

    return pretend


def test_triton_for_windows_is_used_where_it_is_installed(on_windows):
    on_windows(triton=True)
    assert gpu.triton_status("cuda") == (True, "Triton kernels on NVIDIA GeForce RTX 4090")
    assert gpu.arrow_kernels_status("cuda")[0] and flex.flex_status("cuda")[0]


def test_where_it_is_not_the_reason_names_what_brings_it(on_windows):
    on_windows(triton=False)
    for status in (gpu.triton_status, gpu.arrow_kernels_status, flex.flex_status):
        available, reason = status("cuda")
        assert not available and reason.endswith("the package triton is not installed (triton-windows brings it)")


def test_elsewhere_it_is_named_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.triton_status("cuda") == (False, "the package triton is not installed")
