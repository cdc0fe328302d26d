"""The key under which workers keep a model, where a file that a node names is replaced. Prints JSON."""

import json
import sys
import tempfile
from pathlib import Path

from host import load_pack  # isort: skip
import folder_paths  # isort: skip

load_pack()
(bridge,) = (module for name, module in sys.modules.items() if name.endswith("comfy_bridge.parallel.worker_graph"))
NO_INPUTS = {
    "name": "a cat. and a dog", "path": "/data/models/other.safetensors", "above": "../other.png", "long": "猫4.0" * 60,
}  # fmt: skip
prompt = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "reference.png"}},
    "2": {
        "class_type": "EVDiTModelLoader",
        "inputs": {"model_name": "tiny (built in)", "weight_dtype": "default"},
    },
    "3": {"class_type": "ModelPatch", "inputs": {"model": ["2", 0], "image": ["1", 0], **NO_INPUTS}},
    "4": {"class_type": "EVDiTSequenceParallel", "inputs": {"model": ["3", 0]}},
}
with tempfile.TemporaryDirectory() as folder:
    folder_paths.set_input_directory(folder)
    image = Path(folder) / "reference.png"
    keys, openings = [], []
    for content in (b"one", b"one", b"another"):
        if not image.is_file() or image.read_bytes() != content:
            image.write_bytes(content)
        key, opening = bridge.recipe(prompt, "4", "the node")
        keys.append(key)
        openings.append([Path(path).name for path in opening["files"]])
print(json.dumps({"same": keys[0] == keys[1], "replaced": keys[1] != keys[2], "files": openings}))
