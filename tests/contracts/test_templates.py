"""What a template must carry: notes, picture, links to its files, and the same graph for scripts in web/prompts/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCHEMAS = json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8"))
WORKFLOWS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "workflows").glob("*.json"))
}
PROMPTS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "web" / "prompts").glob("*.json"))
}
VIRTUAL = ("Note", "MarkdownNote")
PLAIN = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
FOLDERS = {"diffusion_models", "text_encoders", "vae", "loras", "checkpoints"}
# Files that the page cannot download: they are made from others, and the note says how.
BY_HAND = {"mt5-xxl-encoder.safetensors", "open_sora_plan_v1.2/checkpoint.ckpt"}

templates = pytest.mark.parametrize("name", WORKFLOWS)


def real_nodes(name: str) -> list[dict]:
    return [node for node in WORKFLOWS[name]["nodes"] if node["type"] not in VIRTUAL]


def note_of(name: str) -> str:
    (note,) = [node for node in WORKFLOWS[name]["nodes"] if node["type"] == "MarkdownNote"]
    return note["widgets_values"][0]


@templates
def test_every_node_says_which_pack_it_is_of(name):
    for node in WORKFLOWS[name]["nodes"]:
        own = node["type"].startswith("EVDiT")
        assert node["properties"]["cnr_id"] == ("efficient-vdit" if own else "comfy-core"), node["type"]
        assert re.fullmatch(r"\d+\.\d+\.\d+", node["properties"]["ver"])


@templates
def test_our_nodes_hold_a_value_for_each_widget(name):
    """Values stand by position: one too few or too many shifts them when the workflow is opened."""
    for node in real_nodes(name):
        if node["type"] in SCHEMAS:
            widgets = [field for field, spec in SCHEMAS[node["type"]]["inputs"].items() if spec["type"] in PLAIN]
            controls = sum(value in ("fixed", "randomize") for value in node["widgets_values"])
            assert len(node["widgets_values"]) - controls == len(widgets), node["type"]


@templates
def test_every_link_joins_what_it_says(name):
    nodes = {node["id"]: node for node in WORKFLOWS[name]["nodes"]}
    for number, source, slot, target, position, kind in WORKFLOWS[name]["links"]:
        given, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][position]
        assert number in given["links"] and taken["link"] == number
        assert given["type"] == kind and taken["type"] in (kind, "*")  # PreviewAny takes anything


@templates
def test_every_file_can_be_downloaded(name):
    """A file that a loader names is in that node's properties.models, with a link that the page offers to download."""
    for node in real_nodes(name):
        models = {model["name"]: model for model in node["properties"].get("models", [])}
        named = {str(v) for v in node["widgets_values"] if re.search(r"\.(safetensors|sft|ckpt|gguf)$", str(v))}
        assert named - BY_HAND == set(models), node["type"]
        for model in models.values():
            assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/\S+\.safetensors", model["url"])
            assert model["name"].rsplit("/", 1)[-1] == model["url"].rsplit("/", 1)[-1] and model["directory"] in FOLDERS
            assert model["url"] in note_of(name)
        for file in named & BY_HAND:
            assert file.rsplit("/", 1)[-1] in note_of(name)


@templates
def test_the_note_says_what_a_user_must_know(name):
    text = note_of(name)
    assert "ComfyUI 0.3.60 or newer" in text and text.startswith("## ")
    if any(node["properties"].get("models") for node in real_nodes(name)):
        assert all(f"**{part}" in text for part in ("Files", "Memory and time", "Expect"))


def test_each_template_is_there_for_scripts_too():
    assert list(PROMPTS) == list(WORKFLOWS)


@templates
def test_both_forms_are_one_graph(name):
    """The same classes, links and values under the same ids; which value is whose, tests/comfy asks the server."""
    prompt, links = PROMPTS[name], {link[0]: [str(link[1]), link[2]] for link in WORKFLOWS[name]["links"]}
    assert {key: node["class_type"] for key, node in prompt.items()} == {
        str(n["id"]): n["type"] for n in real_nodes(name)
    }
    for node in real_nodes(name):
        inputs = prompt[str(node["id"])]["inputs"]
        assert {k: v for k, v in inputs.items() if isinstance(v, list)} == {
            slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link")
        }
        values = [value for value in node["widgets_values"] if value not in ("fixed", "randomize")]
        assert [v for v in inputs.values() if not isinstance(v, list)] == values, node["type"]
