"""Input that cannot work is refused before sampling starts, in sentences that say what, why and what to do."""

import json
import struct
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "efficient_vdit_core" / "assets" / "tiny"
FILES = {
    "transformer": TINY / "transformer" / "diffusion_pytorch_model.safetensors",
    "vae": TINY / "vae" / "diffusion_pytorch_model.safetensors",
    "text_encoder": TINY / "text_encoder" / "model.safetensors",
}
LOADERS = {
    "transformer": ("EVDiTModelLoader", "model_name", "diffusion_models"),
    "vae": ("EVDiTVAELoader", "vae_name", "vae"),
    "text_encoder": ("EVDiTTextEncoderLoader", "text_encoder_name", "text_encoders"),
}


@pytest.fixture(scope="session")
def server(server, tmp_path_factory):
    """A second ComfyUI: these tests fill its log with refusals, and others read theirs for complaints."""
    own = type(server)(tmp_path_factory.mktemp("wrong_input"))
    yield own
    own.stop()


def assert_helpful(message: str):
    """At least two whole sentences, no traceback, short enough to be read in a dialog."""
    text = message.strip()
    assert text.endswith("."), message
    assert text.count(". ") + text.count(": ") >= 1, message
    assert "Traceback" not in text and len(text) < 600, message


@pytest.fixture(scope="module")
def refusals(in_process):
    return in_process("refusals")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("plan of another family", ["wan", "opensora_plan"]),
        ("plan of another depth", ["30", "6"]),
        ("plan of other heads", ["24", "4"]),
        ("window that is empty", ["0.6", "0.4", "start_percent"]),
        ("layer beyond the last", ["dense_blocks", "6"]),
        ("backend that cannot run", ["triton", "frames"]),
        ("backend that is none", ["cuda", "frames"]),
        ("latent of 16 channels", ["16", "4"]),
        ("text of another encoder", ["4096", "64"]),
        ("more segments than steps", ["9", "3"]),
    ],
)
def test_a_request_that_does_not_fit_is_refused_before_the_model_runs(refusals, case, words):
    found = refusals[case]
    assert found["message"], f"{case} was accepted"
    assert found["evaluations"] == 0
    assert [w for w in words if w not in found["message"]] == [], found["message"]
    assert_helpful(found["message"])


def test_a_plan_that_finds_no_room_leaves_no_file(refusals):
    assert refusals["full disk"] == {"error": "OSError", "left": []}
    assert refusals["saved"] == ["plan_00001.json"]


def test_an_unknown_model_stays_dense_and_the_log_says_so(refusals):
    found = refusals["unknown model"]
    assert not found["hooked"]
    (line,) = found["lines"]
    assert "Linear stays dense" in line


def _garbage() -> bytes:
    return b"<!DOCTYPE html><html>You need to log in</html>"


def _foreign() -> bytes:
    header = json.dumps({"some.other.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize("fault", ["truncated", "web page", "foreign", "another part", "empty"])
@pytest.mark.parametrize("part", FILES)
def test_a_wrong_file_is_refused_by_its_loader(server, part, fault):
    kind, field, folder = LOADERS[part]
    other = {"transformer": "vae", "vae": "text_encoder", "text_encoder": "transformer"}[part]
    content = {
        "truncated": lambda: FILES[part].read_bytes()[:-1000],
        "web page": _garbage,
        "foreign": _foreign,
        "another part": lambda: FILES[other].read_bytes(),
        "empty": lambda: b"",
    }[fault]()
    name = f"{fault.replace(' ', '_')}_{part}.safetensors"
    target = server.base / "models" / folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    loader = {
        "class_type": kind,
        "inputs": {field: name, **({"weight_dtype": "default"} if part == "transformer" else {})},
    }
    message = server.error({"1": loader, "2": _sink(part)})
    if fault in ("truncated", "web page", "empty"):
        assert name in message and "cut short or damaged" in message, message
    assert_helpful(message)


def _sink(part: str) -> dict:
    """An output node for this part, so that the server runs the loader."""
    kind, field = {
        "transformer": ("ModelSave", "model"),
        "vae": ("VAESave", "vae"),
        "text_encoder": ("CLIPSave", "clip"),
    }[part]
    return {"class_type": kind, "inputs": {field: ["1", 0], "filename_prefix": "never"}}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("EVDiTConsistencySigmas", {"steps": 0}),
        ("EVDiTTilePlan", {"reference_frames": -1}),
        ("EVDiTSparseAttention", {"end_percent": 1.5}),
        ("EVDiTConsistencySampler", {"gamma": 2.0}),
    ],
)
def test_values_outside_their_range_are_refused_when_queued(server, tiny_prompt, kind, changes):
    prompt = tiny_prompt()
    next(n for n in prompt.values() if n["class_type"] == kind)["inputs"].update(changes)
    status, answer = server.post("/prompt", {"prompt": prompt, "client_id": "range"})
    assert status == 400
    (errors,) = answer["node_errors"].values()
    assert errors["errors"][0]["extra_info"]["input_name"] == next(iter(changes))


def test_a_name_that_is_not_in_the_list_reaches_no_file(server, tiny_prompt):
    prompt = tiny_prompt()
    next(n for n in prompt.values() if n["class_type"] == "EVDiTModelLoader")["inputs"]["model_name"] = (
        "../../../../etc/passwd"
    )
    status, answer = server.post("/prompt", {"prompt": prompt, "client_id": "name"})
    if status == 200:  # older versions leave the check of a V3 list to the node
        assert "not found" in server.error(prompt)
    else:
        assert status == 400 and answer["node_errors"]
