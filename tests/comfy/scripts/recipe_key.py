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
    "5": {"class_type": "EVDiTLoadTilePlan", "inputs": {"plan_name": "loras/student.safetensors", "model": ["3", 0]}},
    "6": {"class_type": "EVDiTSparseAttention", "inputs": {"model": ["3", 0], "plan": ["5", 0]}},
    "7": {
        "class_type": "SeveralLoras",
        "inputs": {
            "model": ["6", 0],
            "lora_1": {"on": True, "lora": "first.safetensors", "strength": 1},
            "more": {"__value__": [{"lora": "second.safetensors"}]},
        },
    },
    "4": {"class_type": "EVDiTSequenceParallel", "inputs": {"model": ["7", 0]}},
}
with tempfile.TemporaryDirectory() as folder:
    folder_paths.set_input_directory(folder)
    folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
    named = [
        Path(folder) / name
        for name in ("reference.png", "student.safetensors", "first.safetensors", "second.safetensors")
    ]
    keys, openings = [], []
    changes = ("one", "a", "b", "c"), ("new", "a", "b", "c"), ("new", "new", "b", "c"), ("new", "new", "new", "c")
    for files in (changes[0], *changes, ("new",) * 4):
        for path, content in zip(named, (text.encode() for text in files), strict=True):
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        key, opening = bridge.recipe(prompt, "4", "the node")
        keys.append(key)
        openings.append(sorted(Path(path).name for path in opening["files"]))
replaced = [after != before for before, after in zip(keys[1:], keys[2:], strict=False)]
print(json.dumps({"same": keys[0] == keys[1], "replaced": replaced, "files": openings}))
