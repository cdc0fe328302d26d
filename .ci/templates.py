#!/usr/bin/env python3
"""Writes workflows/*.json (what the template browser opens) and web/prompts/*.json (the same for scripts, in API
format).

Usage: python .ci/templates.py http://127.0.0.1:8188, of a running ComfyUI with this pack: its /object_info orders the
inputs.
"""

from __future__ import annotations

import json
import sys
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from template_graphs import Graph, downloaded_graphs
from tiny_graphs import tiny_graphs

ROOT = Path(__file__).parents[1]
CORE_VERSION, PACK = "0.3.64", "efficient-vdit"
PLAIN = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, GAP, ROW, TITLE = 390, 60, 24, 34  # px
# px that a node needs beside its slots and widgets: for its text, and for what it shows after a run
EXTRA = {"CLIPTextEncode": 100, "PreviewImage": 300, "SaveVideo": 330, "PreviewAny": 160}
CHART, PLAN = 330, "EVDIT_PLAN"  # px of the chart in every node that gives a plan
Inputs = dict[str, tuple[str, bool, bool]]  # name -> type, is a widget, is followed by "control after generate"


def inputs_of(info: dict[str, Any], kind: str) -> Inputs:
    """The inputs of a node class, in the order in which workflows hold their values."""
    found: Inputs = {}
    declared = info[kind]["input"]
    for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        options = spec[1] if len(spec) > 1 else {}
        plain = isinstance(spec[0], list) or spec[0] in PLAIN
        name_type = "COMBO" if isinstance(spec[0], list) else spec[0]
        found[name] = (name_type, plain and not options.get("forceInput"), bool(options.get("control_after_generate")))
    return found


def default_of(info: dict[str, Any], kind: str, name: str) -> Any:
    declared = info[kind]["input"]
    spec = {**declared.get("required", {}), **declared.get("optional", {})}[name]
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    if not choices:
        raise ValueError(f"{kind}.{name} has no default; give the template a value for it.")
    return choices[0]


def api_prompt(graph: Graph, info: dict[str, Any]) -> dict[str, Any]:
    """What POST /prompt takes."""
    numbers = {key: str(i + 1) for i, key in enumerate(graph.nodes)}
    prompt: dict[str, Any] = {}
    for key, node in graph.nodes.items():
        inputs: dict[str, Any] = {}
        for name, (_, widget, _) in inputs_of(info, node.kind).items():
            if name in node.links:
                inputs[name] = [numbers[node.links[name][0]], node.links[name][1]]
            elif widget:
                inputs[name] = node.values[name] if name in node.values else default_of(info, node.kind, name)
        unknown = set(node.values) | set(node.links)
        if unknown - set(inputs):
            raise ValueError(f"{node.kind} has no inputs {sorted(unknown - set(inputs))}.")
        title = {"title": node.title or info[node.kind]["display_name"]}
        prompt[numbers[key]] = {"class_type": node.kind, "inputs": inputs, "_meta": title}
    return prompt


def height_of(inputs: Inputs, outputs: list[str], links: int, kind: str, control: int) -> int:
    widgets = sum(widget for _, widget, _ in inputs.values()) + control
    return TITLE + ROW * (max(links, len(outputs)) + widgets) + EXTRA.get(kind, 0) + (CHART if PLAN in outputs else 0)


def ui_workflow(graph: Graph, info: dict[str, Any]) -> dict[str, Any]:
    """What the page saves: nodes in columns, links by number."""
    prompt, numbers = api_prompt(graph, info), {key: i + 1 for i, key in enumerate(graph.nodes)}
    links: list[list[Any]] = []
    nodes, where = {}, {c: 0 for c in range(9)}
    for order, (key, node) in enumerate(graph.nodes.items()):
        inputs, values = inputs_of(info, node.kind), []
        slots: list[dict[str, Any]] = []
        for name, (kind, widget, control) in inputs.items():
            slot: dict[str, Any] = {"name": name, "type": kind, "link": None}
            if widget:
                slot["widget"] = {"name": name}
                values += [prompt[str(numbers[key])]["inputs"][name]] + (["fixed"] if control else [])
            slots.append(slot)
        controls = sum(control for *_, control in inputs.values())
        height = height_of(inputs, info[node.kind]["output"], len(node.links), node.kind, controls)
        ours = node.kind.startswith("EVDiT")
        properties: dict[str, Any] = (
            {"cnr_id": PACK, "ver": version()} if ours else {"cnr_id": "comfy-core", "ver": CORE_VERSION}
        )
        properties |= {"Node name for S&R": node.kind} | ({"models": node.models} if node.models else {})
        if node.preview:
            properties["evdit_preview"] = dict(zip(("frames", "depth"), node.preview, strict=True))
        outputs = zip(info[node.kind]["output_name"], info[node.kind]["output"], strict=True)
        nodes[key] = {
            "id": numbers[key], "type": node.kind, "pos": [node.column * (COLUMN + GAP), where[node.column]], "size": [COLUMN, height],
            "flags": {}, "order": order + 1, "mode": 0, "inputs": slots,
            "outputs": [{"name": name, "type": kind, "links": []} for name, kind in outputs],
            "properties": properties, "widgets_values": values, **({"title": node.title} if node.title else {}),
        }  # fmt: skip
        where[node.column] += height + GAP
    for key, node in graph.nodes.items():
        for name, (source, slot) in node.links.items():
            position, taken = next((i, s) for i, s in enumerate(nodes[key]["inputs"]) if s["name"] == name)
            taken["link"] = len(links) + 1
            nodes[source]["outputs"][slot]["links"].append(len(links) + 1)
            links.append(
                [len(links) + 1, numbers[source], slot, numbers[key], position, nodes[source]["outputs"][slot]["type"]]
            )
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{graph.name}")), "revision": 0,
        "last_node_id": len(nodes) + 1, "last_link_id": len(links),
        "nodes": [*nodes.values(), note_node(graph, len(nodes) + 1)], "links": links, "groups": [], "config": {},
        "extra": {"ds": {"scale": 0.6, "offset": [560, 190]}}, "version": 0.4,
    }  # fmt: skip


def note_node(graph: Graph, number: int) -> dict[str, Any]:
    return {
        "id": number, "type": "MarkdownNote", "pos": [-COLUMN - GAP - 40, 0], "size": [COLUMN + 40, 620], "flags": {},
        "order": 0, "mode": 0, "inputs": [], "outputs": [], "title": "About this workflow",
        "properties": {"cnr_id": "comfy-core", "ver": CORE_VERSION},
        "widgets_values": [graph.note], "color": "#432", "bgcolor": "#653",
    }  # fmt: skip


def version() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split('\nversion = "')[1].split('"')[0]


def write(folder: str, name: str, value: dict[str, Any]) -> None:
    path = ROOT / folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(server: str) -> None:
    with urllib.request.urlopen(f"{server}/object_info", timeout=60) as answer:
        info = json.load(answer)
    for graph in (*tiny_graphs(), *downloaded_graphs()):
        write("workflows", graph.name, ui_workflow(graph, info))
        write("web/prompts", graph.name, api_prompt(graph, info))


if __name__ == "__main__":
    main(sys.argv[1])
