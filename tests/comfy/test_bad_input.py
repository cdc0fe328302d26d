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
    assert "Traceback" not in text and len(text) <= 400, message


@pytest.fixture(scope="module")
def refusals(in_process):
    return in_process("refusals")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("plan of another family", ["wan", "'opensora_plan (preset)' in Load Tile Plan"]),
        ("plan of another depth", ["30", "6"]),
        ("plan of other heads", ["24", "4"]),
        ("plan by head of more heads", ["24", "4"]),
        ("window that is empty", ["0.6", "0.4", "start_percent"]),
        ("layer beyond the last", ["dense_blocks", "6"]),
        ("backend that cannot run", ["triton", "frames"]),
        ("chunk heads of a model that has none", ["chunk heads", "opensora_plan", "strided"]),
        ("backend that is none", ["cuda", "frames"]),
        ("latent of 16 channels", ["16", "4"]),
        ("text of another encoder", ["4096", "64"]),
        ("more segments than steps", ["9", "3"]),
        ("a fraction of a step", ["steps is 3.5, expected a whole number from 1 to 1,000"]),
        ("a fraction where a part starts", ["start_step is 1.5, expected a whole number"]),
        ("a fraction of a residual's steps", ["residual_every is 2.5, expected a whole number"]),
        ("a residual renewed at each step", ["residual_every is 1, expected 0 for none, or 2 or more"]),
        ("a list of numbers", ["steps is tensor", "expected a whole number"]),
    ],
)
def test_a_request_that_does_not_fit_is_refused_before_the_model_runs(refusals, case, words):
    found = refusals[case]
    assert found["message"], f"{case} was accepted"
    assert found["evaluations"] == 0
    assert [w for w in words if w not in found["message"]] == [], found["message"]
    assert_helpful(found["message"])


def test_a_whole_number_of_another_kind_is_as_good(refusals):
    found = refusals["whole numbers"]
    assert found["found"] == [found["expected"]] * 4 and found["plan"] == "all:2"


def test_a_plan_that_finds_no_room_leaves_no_file(refusals):
    assert refusals["full disk"] == {"error": "ValueError", "left": []}
    assert refusals["saved"] == ["plan_00001.json"]


def test_a_plan_is_saved_in_the_models_folder_under_a_name_that_no_other_folder_has(refusals):
    found = refusals["beside another folder"]
    assert found["name"] == "plan_00003.json" and found["there"] == ["plan_00002.json"]
    assert found["here"] == ["plan_00001.json", "plan_00003.json"]


def test_the_list_of_plans_is_made_once_for_the_texts_of_all(refusals):
    assert refusals["texts"] == dict.fromkeys(["plan_00001.json", "plan_00002.json", "plan_00003.json"], "all:1")
    assert refusals["lists made for them"] == 1


def test_plans_that_would_take_long_to_tell_are_left_to_a_run(refusals):
    """The page asks for all of them at once, and the server answers nobody meanwhile."""
    assert refusals["large"] == {"text": None, "others": True, "loaded": "all:1", "after the time": [None]}


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


@pytest.mark.parametrize("value", [0.5, "text", None, {"samples": 1}, [1, 2, 3], True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("EVDiTSparseAttention", "model"),
        ("EVDiTSparseAttention", "plan"),
        ("EVDiTConsistencySigmas", "model"),
        ("EVDiTSearchTilePlan", "positive"),
        ("EVDiTSearchTilePlan", "latent"),
        ("EVDiTAttentionTileMap", "latent"),
        ("EVDiTSaveTilePlan", "plan"),
        ("EVDiTCompareVideos", "video_a"),
        ("EVDiTReport", "model"),
    ],
)
def test_a_value_where_a_socket_is_gets_a_sentence(server, kind, name, value):
    """Programs write prompts; ComfyUI passes on whatever they put there."""
    prompt = {
        "1": {"class_type": "EVDiTModelLoader", "inputs": {"model_name": "tiny (built in)", "weight_dtype": "default"}},
        "2": {"class_type": "EVDiTTilePlan", "inputs": {"reference_frames": 1}},
        "3": {"class_type": "EVDiTTextEncoderLoader", "inputs": {"text_encoder_name": "tiny (built in)"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["3", 0]}},
        "5": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 29, "batch_size": 1},
        },
        "6": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    }
    whole = {
        "EVDiTSparseAttention": {"model": ["1", 0], "plan": ["2", 0], "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "",
                                 "min_tokens": 0},
        "EVDiTConsistencySigmas": {"model": ["1", 0], "segments": 4, "steps": 4},
        "EVDiTSearchTilePlan": {"model": ["1", 0], "positive": ["4", 0], "latent": ["5", 0], "seed": 0, "probes": 1, "threshold": 0.2,
                                "target_speedup": 0.0, "candidates": "1"},
        "EVDiTAttentionTileMap": {"model": ["1", 0], "positive": ["4", 0], "latent": ["5", 0], "layers": "0", "percent": 0.5,
                                  "seed": 0, "rows": 4},
        "EVDiTSaveTilePlan": {"plan": ["2", 0], "filename_prefix": "plan"},
        "EVDiTCompareVideos": {"video_a": ["6", 0], "video_b": ["6", 0], "name_a": "a", "name_b": "b", "frames_shown": 1, "amplify": 4.0},
        "EVDiTReport": {"model": ["1", 0]},
    }  # fmt: skip
    prompt["9"] = {"class_type": kind, "inputs": {**whole[kind], name: value}}
    prompt["10"] = {"class_type": "PreviewAny", "inputs": {"source": ["9", 0]}}
    status, answer = server.post("/prompt", {"prompt": prompt, "client_id": "sockets"})
    if status != 200:  # ComfyUI itself knows that some are nothing
        assert status == 400 and answer["node_errors"]
        return
    message = server.error(prompt)
    assert f"{name} is " in message and "expected a" in message, message
    assert_helpful(message)


def test_nan_in_a_widget_gets_a_sentence(server):
    prompt = {
        "1": {"class_type": "EVDiTModelLoader", "inputs": {"model_name": "tiny (built in)", "weight_dtype": "default"}},
        "2": {"class_type": "EVDiTTilePlan", "inputs": {"reference_frames": 1}},
        "3": {"class_type": "EVDiTSparseAttention", "inputs": {"model": ["1", 0], "plan": ["2", 0], "start_percent": float("nan"),
                                                              "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
    }  # fmt: skip
    message = server.error(prompt)
    assert "start_percent is nan, expected a number from 0 to 1" in message
    assert_helpful(message)


@pytest.mark.parametrize(
    ("text", "words"),
    [("\ud800", "half a surrogate pair"), ("a" * 100_000, ""), ("a." * 50_000, ""), ("<a " * 30_000, "")],
    ids=range(4),
)
def test_a_prompt_of_any_length_leaves_the_server_free(server, text, words):
    prompt = {
        "1": {"class_type": "EVDiTTextEncoderLoader", "inputs": {"text_encoder_name": "tiny (built in)"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    if words:
        message = server.error(prompt)
        assert words in message
        assert_helpful(message)
    else:
        assert server.run(prompt)["status"]["status_str"] == "success"


def test_a_prefix_longer_than_a_file_name_gets_a_sentence(server):
    prompt = {
        "1": {"class_type": "EVDiTTilePlan", "inputs": {"reference_frames": 1}},
        "2": {"class_type": "EVDiTSaveTilePlan", "inputs": {"plan": ["1", 0], "filename_prefix": "视" * 82}},
    }
    message = server.error(prompt)
    assert "246 bytes in UTF-8, expected at most 244" in message
    assert_helpful(message)


def test_a_label_of_any_length_is_shortened(server):
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 0}},
        "2": {"class_type": "EVDiTCompareVideos", "inputs": {"video_a": ["1", 0], "video_b": ["1", 0], "name_a": "x" * 5000,
                                                            "name_b": "a\nb",
                                                            "frames_shown": 2, "amplify": 4.0}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
    }  # fmt: skip
    assert server.run(prompt)["status"]["status_str"] == "success"
