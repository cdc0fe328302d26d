#!/usr/bin/env python3
"""Writes subgraphs/Faster video model.json: one node for people in a hurry, which the page's library lists as a blueprint.

Usage: python .ci/blueprint.py http://127.0.0.1:8188, of a running ComfyUI with this pack.
"""

from __future__ import annotations

import json
import sys
import urllib.request
import uuid
from typing import Any

from templates import PACK, ROOT, default_of, inputs_of, version

NAME = "Faster video model"
ABOUT = (
    "Makes a video model faster by sparse attention: the first two layers and the last, and the first steps, stay dense. "
    "6 reference frames suit Wan at 81 frames; otherwise take about a quarter of the clip's latent frames. Open it after a run: "
    "Sparse Attention inside says what became sparse, or why nothing did."
)
PLAN, SPARSE, INPUT, OUTPUT = 1, 2, -10, -20  # numbers of the nodes; the page's own for a subgraph's two ends
VALUES = {PLAN: {"reference_frames": 6}, SPARSE: {"start_percent": 0.2, "dense_blocks": "0-1,-1"}}
KINDS = {PLAN: "EVDiTTilePlan", SPARSE: "EVDiTSparseAttention"}
# What the node shows: name, label, type, and the input that it leads to
SHOWN = (
    ("model", "model", "MODEL", SPARSE, "model"),
    ("reference_frames", "reference frames (fewer = faster)", "INT", PLAN, "reference_frames"),
    ("start_percent", "start", "FLOAT", SPARSE, "start_percent"),
)


def named(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/blueprint/{text}"))


def node(info: dict[str, Any], number: int, links: dict[str, int], out: list[int]) -> dict[str, Any]:
    """One node inside, with its links by the name of the input."""
    kind = KINDS[number]
    inputs, slots, values = inputs_of(info, kind), [], []
    for name, (kind_of_input, widget, _) in inputs.items():
        slots.append({"name": name, "type": kind_of_input, "link": links.get(name)})
        if widget:
            slots[-1]["widget"] = {"name": name}
            values.append(VALUES[number].get(name, default_of(info, kind, name)))
    (output,) = info[kind]["output"]
    return {
        "id": number, "type": kind, "pos": [400 * number - 400, 0], "size": [340, 340], "flags": {}, "order": number - 1, "mode": 0,
        "inputs": slots, "outputs": [{"name": info[kind]["output_name"][0], "type": output, "links": out}],
        "properties": {"cnr_id": PACK, "ver": version(), "Node name for S&R": kind}, "widgets_values": values,
    }  # fmt: skip


def subgraph(info: dict[str, Any]) -> dict[str, Any]:
    """Tile Plan and Sparse Attention, with what is shown as links from the subgraph's input."""
    links, taken = [], {PLAN: {}, SPARSE: {}}

    def link(source: int, slot: int, target: int, name: str, kind: str) -> int:
        number = len(links) + 1
        position = list(inputs_of(info, KINDS[target])).index(name) if target in KINDS else 0
        links.append(
            {
                "id": number,
                "origin_id": source,
                "origin_slot": slot,
                "target_id": target,
                "target_slot": position,
                "type": kind,
            }
        )
        if target in KINDS:
            taken[target][name] = number
        return number

    inputs = [
        {
            "id": named(name), "name": name, "label": label, "type": kind, "linkIds": [link(INPUT, slot, target, field, kind)],
            "pos": [-160, 20 + 20 * slot],
        }
        for slot, (name, label, kind, target, field) in enumerate(SHOWN)
    ]  # fmt: skip
    plan = link(PLAN, 0, SPARSE, "plan", "EVDIT_PLAN")
    out = link(SPARSE, 0, OUTPUT, "model", "MODEL")
    return {
        "id": named(NAME), "version": 1, "revision": 0, "config": {}, "name": NAME, "category": "Efficient-vDiT", "description": ABOUT,
        "state": {"lastGroupId": 0, "lastNodeId": SPARSE, "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": INPUT, "bounding": [-300, 0, 140, 100]}, "outputNode": {"id": OUTPUT, "bounding": [820, 0, 120, 60]},
        "inputs": inputs,
        "outputs": [{"id": named("out"), "name": "model", "type": "MODEL", "linkIds": [out], "pos": [840, 20]}],
        "widgets": [], "nodes": [node(info, PLAN, taken[PLAN], [plan]), node(info, SPARSE, taken[SPARSE], [out])],
        "groups": [], "links": links, "extra": {},
    }  # fmt: skip


def blueprint(info: dict[str, Any]) -> dict[str, Any]:
    """A workflow of the one node, as the page saves a blueprint."""
    inner = subgraph(info)
    slots = [
        {
            "name": name,
            "label": label,
            "type": kind,
            "link": None,
            **({} if kind == "MODEL" else {"widget": {"name": name}}),
        }
        for name, label, kind, *_ in SHOWN
    ]
    widgets = [(name, VALUES[target][field]) for name, _, kind, target, field in SHOWN if kind != "MODEL"]
    outer = {
        "id": 1, "type": inner["id"], "pos": [0, 0], "size": [340, 110], "flags": {}, "order": 0, "mode": 0, "title": NAME,
        "inputs": slots, "outputs": [{"name": "model", "type": "MODEL", "links": None}],
        "properties": {"proxyWidgets": [["-1", name] for name, _ in widgets], "cnr_id": PACK, "ver": version()},
        "widgets_values": [value for _, value in widgets],
    }  # fmt: skip
    return {
        "id": named("workflow"), "revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [outer], "links": [], "groups": [],
        "version": 0.4, "definitions": {"subgraphs": [inner]}, "extra": {},
    }  # fmt: skip


def main(server: str) -> None:
    with urllib.request.urlopen(f"{server}/object_info", timeout=60) as answer:
        info = json.load(answer)
    path = ROOT / "subgraphs" / f"{NAME}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(blueprint(info), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
