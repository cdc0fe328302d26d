"""What a template must carry: notes, picture, links to its files, and the same graph for scripts in web/prompts/."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from templates import PATHS, prompt, workflow

from efficient_vdit_core.plan import TilePlan

ROOT = Path(__file__).parents[2]
SCHEMAS = json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8"))
WORKFLOWS = {name: workflow(name) for name in PATHS}
VIRTUAL = ("Note", "MarkdownNote")
PLAIN = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
FOLDERS = {"diffusion_models", "text_encoders", "vae", "loras", "checkpoints", "latent_upscale_models"}
ANY = "COMFY_MATCHTYPE_V3"  # ComfyUI's type of a switch
# Files that the page cannot download: they are made from others, and the note says how.
BY_HAND = {"mt5-xxl-encoder.safetensors", "open_sora_plan_v1.2/checkpoint.ckpt"}

NAMES = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))

templates = pytest.mark.parametrize("name", WORKFLOWS)


def real_nodes(name: str) -> list[dict]:
    return [node for node in WORKFLOWS[name]["nodes"] if node["type"] not in VIRTUAL]


def gives_plan(node: dict) -> bool:
    return any(output["type"] == "EVDIT_PLAN" for output in node["outputs"])


def note_of(name: str) -> str:
    (note,) = [node for node in WORKFLOWS[name]["nodes"] if node["type"] == "MarkdownNote"]
    return note["widgets_values"][0]


def test_notes_are_what_their_generator_writes():
    """In a process of its own: the generator's modules have names of the tests' helpers. Marks around names differ."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / '.ci')!r}]\n"
        "import json\n"
        "from downloaded_graphs import downloaded_graphs\nfrom tiny_graphs import tiny_graphs\n"
        "print(json.dumps([graph.note for graph in (*tiny_graphs(), *downloaded_graphs())]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    made = {re.sub(r"[`*\\]", "", note) for note in json.loads(done.stdout)}
    assert made == {re.sub(r"[`*\\]", "", note_of(name)) for name in WORKFLOWS}


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
        # PreviewAny takes anything, and a switch gives what it takes.
        assert given["type"] == kind and (taken["type"] in (kind, "*", ANY) or kind == ANY)


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
    assert re.search(r"Needs ComfyUI 0\.\d+(\.\d+)? or newer", text) and text.startswith("## ")
    if any(node["properties"].get("models") for node in real_nodes(name)):
        assert all(f"**{part}" in text for part in ("Files", "Memory and time", "Expect"))


@templates
def test_the_note_names_the_node_that_shows_the_plan(name):
    shown = {node.get("title") or NAMES[node["type"]]["display_name"] for node in real_nodes(name) if gives_plan(node)}
    assert set(re.findall(r"Click a layer in \*([^*]+)\*", note_of(name))) <= shown


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if "of the self-attention" in note_of(name)])
def test_the_note_tells_what_each_sparse_model_computes(name):
    """The plan is the same for Wan 2.2's two experts, but not the blocks that stay dense."""
    (shown,) = filter(gives_plan, real_nodes(name))
    frames, depth = (shown["properties"]["evdit_preview"][size] for size in ("frames", "depth"))
    sent = prompt(name)
    for values in (node["inputs"] for node in sent.values() if node["class_type"] == "EVDiTSparseAttention"):
        plan = TilePlan.from_text(sent[values["plan"][0]]["inputs"]["text"]).with_dense(values["dense_blocks"])
        assert f"{plan.density(frames, depth):.0%}" in note_of(name), values["dense_blocks"]


def test_each_template_is_there_for_scripts_too():
    assert {path.stem for path in (ROOT / "web" / "prompts").glob("*.json")} == set(WORKFLOWS)


@templates
def test_both_forms_are_one_graph(name):
    """The same classes, links and values under the same ids; which value is whose, tests/comfy asks the server."""
    sent, links = prompt(name), {link[0]: [str(link[1]), link[2]] for link in WORKFLOWS[name]["links"]}
    assert {key: node["class_type"] for key, node in sent.items()} == {
        str(n["id"]): n["type"] for n in real_nodes(name)
    }
    for node in real_nodes(name):
        inputs = sent[str(node["id"])]["inputs"]
        assert {k: v for k, v in inputs.items() if isinstance(v, list)} == {
            slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link")
        }
        values = [value for value in node["widgets_values"] if value not in ("fixed", "randomize")]
        # A dictionary is for a widget that only draws, which the page keeps no value of.
        assert [v for v in inputs.values() if not isinstance(v, list | dict)] == values, node["type"]


TITLE, SLOT = 30, 20  # px of a node's head and of a slot
WINDOW = 0.75 * 1920, 0.75 * 1030  # px: what the page fits a template into, on a screen of 1920 x 1080
READABLE = 8 / 14  # the classic canvas draws no text below this scale
# A checkpoint gives its VAE to the other end; the tiny ones show one model several times.
CROSSING = {
    "tiny_app",
    "ltx23_two_stages",
    "tiny_dense_beside_sparse",
    "tiny_three_stages",
    "tiny_search_a_plan",
    "tiny_attention_tile_map",
}


def boxes(name: str) -> dict[int, tuple[float, float, float, float]]:
    """Left, top, right and bottom of each node, with its title."""
    nodes = WORKFLOWS[name]["nodes"]
    return {
        n["id"]: (n["pos"][0], n["pos"][1] - TITLE, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1])
        for n in nodes
    }


@templates
def test_it_opens_at_a_size_that_can_be_read(name):
    left, top, right, bottom = zip(*boxes(name).values(), strict=True)
    width, height = max(right) - min(left) + 20, max(bottom) - min(top) + 20
    assert min(WINDOW[0] / width, WINDOW[1] / height) > READABLE


@templates
def test_no_node_lies_over_another(name):
    found = list(boxes(name).values())
    for i, (left, top, right, bottom) in enumerate(found):
        for other in found[i + 1 :]:
            assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1], (
                name,
                found[i],
                other,
            )


@templates
def test_every_node_stands_in_a_titled_group(name):
    groups = [group["bounding"] for group in WORKFLOWS[name]["groups"] if group["title"]]
    for node in real_nodes(name):
        left, top, right, bottom = boxes(name)[node["id"]]
        assert any(x <= left and y <= top and right <= x + w and bottom <= y + h for x, y, w, h in groups), node["type"]


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name not in CROSSING])
def test_no_wire_runs_behind_a_node(name):
    """A link leads to a node of its own column or of the next one."""
    column = {node["id"]: node["pos"][0] for node in WORKFLOWS[name]["nodes"]}
    order = sorted(set(column.values()))
    steps = [order.index(column[link[3]]) - order.index(column[link[1]]) for link in WORKFLOWS[name]["links"]]
    assert set(steps) <= {0, 1}


def test_no_two_pictures_are_alike():
    pictures = [path.with_suffix(".jpg").read_bytes() for path in PATHS.values()]
    assert len(set(pictures)) == len(pictures)


def test_titles_are_told_apart_and_the_tiny_ones_are_first():
    titles = [path.stem for path in PATHS.values()]
    assert [name.startswith("tiny") for name in PATHS] == sorted(
        (name.startswith("tiny") for name in PATHS), reverse=True
    )
    assert all(re.fullmatch(r"\d\d [A-Z][\w., -]+", title) and len(title) <= 40 for title in titles)


@pytest.mark.parametrize(
    "word", ["faster", "sparse", "wan 2.2 14b faster", "multi gpu", "distill", "4 steps", "no download"]
)
def test_what_a_user_types_finds_a_template(word):
    """The page searches in the names of the files."""
    assert any(word in path.stem.lower() for path in PATHS.values())


@pytest.mark.parametrize("path", sorted((ROOT / "subgraphs").glob("*.json")), ids=lambda p: p.stem)
def test_a_blueprints_nodes_hold_a_value_for_each_widget(path):
    (inner,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    for node in inner["nodes"]:
        inputs = SCHEMAS[node["type"]]["inputs"]
        assert [slot["name"] for slot in node["inputs"]] == list(inputs)
        assert len(node["widgets_values"]) == sum(spec["type"] in PLAIN for spec in inputs.values())
