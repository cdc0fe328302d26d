"""Every shipped template against the server: its two forms agree, and only files that must be downloaded are
missing."""

import json

import pytest
from comfyui_server import to_api
from templates import PATHS, prompt, workflow

NAMES = list(PATHS)
# Open-Sora-Plan's files are read by loaders of this pack, which say what is missing when they run.
STOCK_LOADERS = [name for name in NAMES if not name.startswith(("tiny", "opensora"))]
OWN_LOADERS = [name for name in NAMES if name.startswith("opensora")]
TINY = [name for name in NAMES if name.startswith("tiny")]
SHOWS = {"PreviewImage": "images", "SaveVideo": "images", "PreviewAny": "text"}


@pytest.fixture
def known(server, name) -> dict:
    """The server's nodes, where it has all that the template uses: an older ComfyUI lacks the newest models'."""
    info = server.get("/object_info")
    missing = set()
    for node in prompt(name).values():
        kind = node["class_type"]
        if kind not in info:
            missing.add(kind)
            continue
        declared = {field for group in info[kind]["input_order"].values() for field in group}
        # A field of a choice within a choice, such as "mode.steps", is declared inside that one.
        missing |= {f"{kind}.{field}" for field in set(node["inputs"]) - declared if "." not in field}
    ours = sorted(lacking for lacking in missing if lacking.startswith("EVDiT"))
    assert not ours, ours
    if missing:
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(missing))}")
    return info


@pytest.mark.parametrize("name", NAMES)
def test_the_two_forms_say_the_same(known, name):
    converted, sent = _plain(to_api(workflow(name), known)), _plain(prompt(name))
    assert converted == sent


def _plain(nodes: dict) -> dict:
    """Classes and inputs, these without the choice they stand in: after 0.33.0 ComfyUI moved the codec of Save Video into
    its format, where the page puts a saved one too, and takes it beside the format from scripts as before."""
    found = {}
    for key, node in nodes.items():
        inputs = {name.rpartition(".")[2]: value for name, value in node["inputs"].items()}
        assert len(inputs) == len(node["inputs"]), node
        found[key] = {"class_type": node["class_type"], "inputs": inputs}
    return found


@pytest.mark.parametrize("name", STOCK_LOADERS)
def test_the_server_misses_nothing_but_files(server, known, name):
    """Every fault it names is a file that is not in its list; so wiring, types and ranges are right."""
    status, answer = server.post("/prompt", {"prompt": prompt(name)})
    assert status == 400, answer
    faults = [fault for node in answer["node_errors"].values() for fault in node["errors"]]
    assert faults and {fault["type"] for fault in faults} == {"value_not_in_list"}
    missing = {fault["extra_info"]["received_value"] for fault in faults}
    assert all(str(file).endswith((".safetensors", ".ckpt")) for file in missing), missing


@pytest.mark.parametrize("name", OWN_LOADERS)
def test_our_loaders_name_the_file_that_is_missing(server, name):
    sent = prompt(name)
    values = [
        str(v) for node in sent.values() if node["class_type"].startswith("EVDiT") for v in node["inputs"].values()
    ]
    files = [value for value in values if value.endswith((".safetensors", ".ckpt"))]
    # From 0.8 on the server itself compares the choices of such nodes with their lists, before the run.
    status, answer = server.post("/prompt", {"prompt": sent})
    message = json.dumps(answer["node_errors"]) if status == 400 else server.error(sent)
    assert any(file in message for file in files), message


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_ones_run_to_the_end(server, known, name):
    """With two steps of sampling in place of fifty; every node that shows something has something to show."""
    sent = prompt(name)
    for node in sent.values():
        if node["class_type"] == "EVDiTConsistencySigmas":
            node["inputs"].update(segments=2, steps=2)
    entry = server.run(sent)
    assert entry["status"]["status_str"] == "success", entry["status"]
    showing = {key: SHOWS[node["class_type"]] for key, node in sent.items() if node["class_type"] in SHOWS}
    assert showing and all(entry["outputs"][key][what] for key, what in showing.items())
