"""One ComfyUI server for all tests of this folder, and scripts run by ComfyUI's own python."""

import warnings
from pathlib import Path

import pytest
from comfyui_scripts import Scripts
from comfyui_server import Server, to_api, why_no_comfyui
from templates import workflow


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.comfy)
    reason = why_no_comfyui()
    if here and reason:
        warnings.warn(reason, stacklevel=1)
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("comfyui"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def in_process(tmp_path_factory):
    """Runs a script of scripts/ with ComfyUI's python inside the checkout; returns the JSON of its last line."""
    scripts = Scripts({"EVDIT_CACHE_DIR": str(tmp_path_factory.mktemp("measured"))})
    yield scripts.run
    scripts.stop()


@pytest.fixture(scope="session")
def tiny_prompt(server):
    """The shipped tiny workflow in API format; a fresh copy for each call."""

    def make() -> dict:
        return to_api(workflow("tiny_text_to_video"), server.get("/object_info"))

    return make
