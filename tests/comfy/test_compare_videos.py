"""Compare Videos inside a running ComfyUI, between stock nodes."""

import math
import re

import imageio.v3 as imageio
import numpy as np
import pytest


def compare_prompt(**changes) -> dict:
    """Black against a grey of 0.2, both of 3 frames of 64x48; keys "2.width" and the like change an input."""
    blank = {"width": 64, "height": 48, "batch_size": 3}
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {**blank, "color": 0x000000}},
        "2": {"class_type": "EmptyImage", "inputs": {**blank, "color": 0x333333}},
        "3": {
            "class_type": "EVDiTCompareVideos",
            "inputs": {
                "video_a": ["1", 0],
                "video_b": ["2", 0],
                "name_a": "black",
                "name_b": "grey",
                "frames_shown": 3,
                "amplify": 4.0,
            },
        },
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "compare/picture"}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
    }
    for place, value in changes.items():
        node, name = place.split(".")
        prompt[node]["inputs"][name] = value
    return prompt


def test_the_table_and_the_picture_reach_stock_nodes(server):
    entry = server.run(compare_prompt())
    assert entry["status"]["status_str"] == "success", entry["status"]
    (table,) = entry["outputs"]["5"]["text"]
    lines = dict(re.findall(r"^(\S+(?: \S+)*)  +(\S+)", table, re.M))
    assert "grey against black: 3 frames, 64x48" in table
    assert float(lines["PSNR"]) == pytest.approx(-20 * math.log10(0.2), abs=0.01)
    assert float(lines["SSIM"]) == pytest.approx(1e-4 / (0.2**2 + 1e-4), abs=1e-4)
    assert lines["temporal PSNR"] == "identical" and lines["motion of black"] == "0.00"
    (saved,) = entry["outputs"]["4"]["images"]
    picture = imageio.imread(server.base / "output" / saved["subfolder"] / saved["filename"])
    assert picture.shape[1] >= 900 and picture.shape[2] == 3
    assert [(np.abs(picture.astype(int) - level).max(-1) <= 1).mean() > 0.1 for level in (0x00, 0x33)] == [True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"2.batch_size": 4}, ["3 frames", "4"]),
        ({"2.width": 72}, ["64x48", "72x48"]),
        ({"1.height": 8, "2.height": 8}, ["64x8", "11"]),
    ],
)
def test_videos_that_are_no_pair_are_refused(server, changes, words):
    message = server.error(compare_prompt(**changes))
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("changes", [{"3.frames_shown": 13}, {"3.frames_shown": 0}, {"3.amplify": 0.5}])
def test_widgets_out_of_range_are_refused_before_the_run(server, changes):
    status, answer = server.post("/prompt", {"prompt": compare_prompt(**changes)})
    assert status == 400 and "3" in answer["node_errors"]
