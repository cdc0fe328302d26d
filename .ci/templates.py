#!/usr/bin/env python3
"""Writes workflows/*.json (what the template browser opens) and web/prompts/*.json (the same for scripts, in API
format).

Usage: python .ci/templates.py http://127.0.0.1:8188 [CHROMIUM], of a running ComfyUI with this pack: its /object_info
orders the inputs, and its page says how high each node is.

A template is a `Graph` of graph.py: nodes by a name of their own, each in a column, and a note. To add one, write a function
that returns a Graph in the file of its model's family, and yield it in tiny_graphs.py's or downloaded_graphs.py's last
function; then run this command, thumbnails.py, and tests/contracts/test_templates.py, which has the rules:

- The page names a template by its file, so the file is called by the graph's number and title. The tiny ones are first.
- Columns are 340 px wide and stand in the order of the work; each is a group with a title. Nodes stand in a column in the
  order of the dictionary. The note stands above the first column where both fit into 1300 px, else 400 px wide before it.
- The page shows a template at three quarters of its window, and the classic canvas draws no text below 57 %: at most five
  columns, each at most 1300 px high with what its nodes show after a run.
- A link goes to the same column or to the next one, so that no wire runs behind a node; a loader stands beside its user.
- A graph with ``app`` opens as an app (App Mode): these widgets, and what its Save nodes show.
- Every file has a link and a folder, in the loader's ``models`` and in the note.
"""

from __future__ import annotations

import json
import math
import re
import sys
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from comfy_page import open_page
from downloaded_graphs import downloaded_graphs
from graph import Graph, Node
from tiny_graphs import tiny_graphs

ROOT = Path(__file__).parents[1]
CORE_VERSION, PACK = "0.3.64", "efficient-vdit"
PLAIN = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
DRAWN = {"IMAGECOMPARE": ["", ""]}  # widgets that only draw: a workflow holds no value of theirs, a prompt this one
COLUMN, NOTE, GAP, ROW, TITLE = 340, 400, 60, 30, 30  # px: widths, between columns, between nodes, of a node's title
# px that a node needs beside what it has when it is new: for its text, and for what it shows after a run
EXTRA = {
    "CLIPTextEncode": 40, "PreviewImage": 300, "SaveVideo": 280, "PreviewAny": 60, "EVDiTSearchTilePlan": 270, "ImageCompare": 120,
}  # fmt: skip
CHART_EXTRA, PLAN = 36, "EVDIT_PLAN"  # px of the last run's figures in the chart of every node that gives a plan
LETTER, LINE = 5.7, 17  # px of a note's text
SPREAD = 1.4  # Nodes 2.0 of ComfyUI 0.25.0 draw a note so much higher than its size
EDGE, HEAD, HIGHEST = 15, 50, 1300  # px: around the nodes of a group, above them with its title, of a column
Heights = dict[str, int]  # node class -> px with its title, in the higher of both renderers
MEASURE = """kinds => {
    app.graph.clear();
    for (const kind of kinds) {
        const node = LiteGraph.createNode(kind);
        app.graph.add(node);
        node.pos = [400 * app.graph.nodes.length, 100];
        node.setSize([COLUMN, 10]);
    }
    Object.assign(app.canvas.ds, { scale: 0.1, offset: [0, 0] });
    app.canvas.setDirty(true, true);
}""".replace("COLUMN", str(COLUMN))
MEASURED = f"""() => app.graph.nodes.map(n => [n.type,
    document.querySelector(`[data-node-id="${{n.id}}"]`)?.offsetHeight ?? Math.max(n.size[1], n.computeSize()[1]) + {TITLE}])"""
Inputs = dict[str, tuple[str, bool, bool]]  # name -> type, is a widget, is followed by "control after generate"


def inputs_of(info: dict[str, Any], kind: str) -> Inputs:
    """The inputs of a node class, in the order in which workflows hold their values."""
    found: Inputs = {}
    declared = info[kind]["input"]
    for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        options = spec[1] if len(spec) > 1 else {}
        # An input that takes several types ("FLOAT,INT") is a widget of the one that it names.
        spec = [options.get("widgetType", spec[0]), options]
        plain = isinstance(spec[0], list) or spec[0] in PLAIN
        # A list of choices that bring more widgets is a plain list in earlier versions.
        name_type = "COMBO" if isinstance(spec[0], list) or spec[0] == "COMFY_DYNAMICCOMBO_V3" else spec[0]
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
    return choices[0]["key"] if isinstance(choices[0], dict) else choices[0]


def api_prompt(graph: Graph, info: dict[str, Any]) -> dict[str, Any]:
    """What POST /prompt takes."""
    numbers = {key: str(i + 1) for i, key in enumerate(graph.nodes)}
    prompt: dict[str, Any] = {}
    for key, node in graph.nodes.items():
        inputs: dict[str, Any] = {}
        ours = node.kind.startswith("EVDiT")  # of others, later versions append optional widgets
        for name, (kind, widget, _) in inputs_of(info, node.kind).items():
            if kind in DRAWN:
                inputs[name] = {"__value__": DRAWN[kind]}  # as the page sends a list
            elif name in node.links:
                inputs[name] = [numbers[node.links[name][0]], node.links[name][1]]
            elif widget and (name in node.values or ours or name not in info[node.kind]["input"].get("optional", {})):
                inputs[name] = node.values[name] if name in node.values else default_of(info, node.kind, name)
        unknown = set(node.values) | set(node.links)
        if unknown - set(inputs):
            raise ValueError(f"{node.kind} has no inputs {sorted(unknown - set(inputs))}.")
        title = {"title": node.title or info[node.kind]["display_name"]}
        prompt[numbers[key]] = {"class_type": node.kind, "inputs": inputs, "_meta": title}
    return prompt


def measure(server: str, chromium: str, kinds: list[str]) -> Heights:
    """How high each node is on the page, at a column's width."""
    heights: Heights = {}
    for modern in (False, True):
        with open_page(server, chromium, 1920, 1080, modern=modern) as page:
            page.evaluate(MEASURE, kinds)
            page.wait_for_timeout(5000)
            for kind, height in page.evaluate(MEASURED):
                heights[kind] = max(heights.get(kind, 0), round(height))
    return heights


def ui_workflow(graph: Graph, info: dict[str, Any], heights: Heights) -> dict[str, Any]:
    """What the page saves: nodes in columns, links by number."""
    prompt, numbers = api_prompt(graph, info), {key: i + 1 for i, key in enumerate(graph.nodes)}
    links: list[list[Any]] = []
    first = sum(room(node, info, heights) for node in graph.nodes.values() if node.column == 0) - ROW
    note, start = note_node(graph, len(graph.nodes) + 1, first)
    nodes, where = {}, {c: start if c == 0 else 0 for c in range(9)}
    labels = {(node, widget): {"label": label} for node, widget, label in graph.app}
    for order, (key, node) in enumerate(graph.nodes.items()):
        inputs, values = inputs_of(info, node.kind), []
        slots: list[dict[str, Any]] = []
        for name, (kind, widget, control) in inputs.items():
            slot: dict[str, Any] = {"name": name, "type": kind, "link": None}
            if kind in DRAWN:
                slot["widget"] = {"name": name}
            elif widget:
                if name not in prompt[str(numbers[key])]["inputs"]:
                    continue
                slot |= {"widget": {"name": name}, **labels.get((key, name), {})}
                values += [prompt[str(numbers[key])]["inputs"][name]] + (["fixed"] if control else [])
            slots.append(slot)
        ours = node.kind.startswith("EVDiT")
        properties: dict[str, Any] = (
            {"cnr_id": PACK, "ver": version()} if ours else {"cnr_id": "comfy-core", "ver": CORE_VERSION}
        )
        properties |= {"Node name for S&R": node.kind} | ({"models": node.models} if node.models else {})
        if node.preview:
            properties["evdit_preview"] = dict(zip(("frames", "depth"), node.preview, strict=True))
        outputs = zip(info[node.kind]["output_name"], info[node.kind]["output"], strict=True)
        nodes[key] = {
            "id": numbers[key], "type": node.kind, "pos": [node.column * (COLUMN + GAP), where[node.column] + TITLE],
            "size": [COLUMN, height_of(node, heights) - TITLE],
            "flags": {}, "order": order + 1, "mode": 0, "inputs": slots,
            "outputs": [{"name": name, "type": kind, "links": []} for name, kind in outputs],
            "properties": properties, "widgets_values": values, **({"title": node.title} if node.title else {}),
        }  # fmt: skip
        where[node.column] += room(node, info, heights)
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
        "nodes": [*nodes.values(), note], "links": links, "groups": groups(graph, where, start), "config": {},
        "extra": {"ds": {"scale": 0.6, "offset": [560, 190]}, "template": graph.name, **app_mode(graph, numbers)}, "version": 0.4,
    }  # fmt: skip


def room(node: Node, info: dict[str, Any], heights: Heights) -> int:
    """px that a node takes in its column, with the gap below it."""
    chart = CHART_EXTRA if PLAN in info[node.kind]["output"] else 0
    return height_of(node, heights) + ROW + chart


def height_of(node: Node, heights: Heights) -> int:
    """px of a node with its title, before a run."""
    return heights[node.kind] + EXTRA.get(node.kind, 0) + node.extra


def app_mode(graph: Graph, numbers: dict[str, int]) -> dict[str, Any]:
    """What makes the page open a template as an app: its inputs and outputs."""
    if not graph.app:
        return {}
    inputs = [[str(numbers[node]), widget] for node, widget, _ in graph.app]
    outputs = [str(numbers[key]) for key, node in graph.nodes.items() if node.kind.startswith("Save")]
    return {"linearMode": True, "linearData": {"inputs": inputs, "outputs": outputs}}


def groups(graph: Graph, where: dict[int, int], start: int) -> list[dict[str, Any]]:
    """A box with a title around each column, of which the first begins at ``start``."""
    boxes = []
    for number, title in enumerate(graph.columns):
        top = (0 if number else start) - HEAD
        height = where[number] - ROW + EDGE - top
        bounding = [number * (COLUMN + GAP) - EDGE, top, COLUMN + 2 * EDGE, height]
        boxes.append(
            {"id": number + 1, "title": title, "color": "#3f789e", "font_size": 22, "flags": {}, "bounding": bounding}
        )
    return boxes


def note_node(graph: Graph, number: int, first: int) -> tuple[dict[str, Any], int]:
    """The note, and where the nodes of the first column begin, which are ``first`` px high: below it, or beside it."""
    start = round(SPREAD * note_height(graph, COLUMN)) + TITLE + HEAD + ROW
    above = start + first <= HIGHEST
    width, left = (COLUMN, 0) if above else (NOTE, -NOTE - GAP)
    note = {
        "id": number, "type": "MarkdownNote", "pos": [left, TITLE], "size": [width, note_height(graph, width)], "flags": {},
        "order": 0, "mode": 0, "inputs": [], "outputs": [], "title": "About this workflow",
        "properties": {"cnr_id": "comfy-core", "ver": CORE_VERSION},
        "widgets_values": [without_code(graph.note)],
    }  # fmt: skip
    return note, start if above else 0


def without_code(text: str) -> str:
    """Names in bold: Nodes 2.0 shows a note's code in dark blue on a coloured ground, which nobody can read."""
    return re.sub("`([^`]+)`", lambda name: f"**{name[1].replace('~', chr(92) + '~')}**", text)


def note_height(graph: Graph, width: int) -> int:
    """px of the note's text in lines of ``width`` px."""
    shown = re.sub(r"\]\([^)]*\)", "", graph.note)  # a link shows its words
    return LINE * sum(max(1, math.ceil(len(line) * LETTER / (width - 40))) for line in shown.splitlines()) + 40


def version() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split('\nversion = "')[1].split('"')[0]


def write(folder: str, name: str, value: dict[str, Any]) -> None:
    path = ROOT / folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(server: str, chromium: str) -> None:
    with urllib.request.urlopen(f"{server}/object_info", timeout=60) as answer:
        info = json.load(answer)
    graphs = [*tiny_graphs(), *downloaded_graphs()]
    heights = measure(server, chromium, sorted({node.kind for graph in graphs for node in graph.nodes.values()}))
    for path in (ROOT / "workflows").glob("*.json"):
        path.unlink()
    for number, graph in enumerate(graphs, 1):
        ending = ".app" if graph.app else ""
        write("workflows", f"{number:02} {graph.title}{ending}", ui_workflow(graph, info, heights))
        write("web/prompts", graph.name, api_prompt(graph, info))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
