"""Nodes, help pages, locales and workflows move together. schemas.json is what the nodes promise; tests/comfy compares
it."""

import json
import re
from pathlib import Path

import pytest

from efficient_vdit_core.assets import tiny_path
from efficient_vdit_core.models.distilled import metadata_of
from efficient_vdit_core.plan.head_patterns import HeadPatterns

ROOT = Path(__file__).parents[2]
SCHEMAS = json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8"))
CHINESE = re.compile("[一-鿿]")
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
DOCS = ROOT / "web" / "docs"
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)|<img[^>]*\bsrc=\"([^\"]+)\"")


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_node_has_a_help_page_that_names_its_inputs(node):
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert [name for name in SCHEMAS[node]["inputs"] if name not in page] == []


@pytest.mark.parametrize(
    "page", sorted((ROOT / "web" / "docs").glob("*/*.md")), ids=lambda p: f"{p.parent.name} {p.stem}"
)
def test_a_translated_page_says_as_much(page):
    """The same sections, list entries and table rows as the English page, in the other language."""
    english = (page.parent.parent / f"{page.parent.name}.md").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    for mark in ("\n## ", "\n### ", "\n- ", "\n| "):
        assert text.count(mark) == english.count(mark), mark
    assert CHINESE.search(text)


@pytest.mark.parametrize("node", SCHEMAS)
def test_a_chinese_page_names_inputs_as_the_node_does(node):
    entry = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))[node]
    text = (DOCS / node / "zh.md").read_text(encoding="utf-8").split("## 输入")[1].split("\n## ")[0]
    missing = [
        name for name, field in entry.get("inputs", {}).items() if field["name"] not in text or f"`{name}`" not in text
    ]
    assert missing == []


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: str(p.relative_to(DOCS)))
def test_tables_have_two_columns(page):
    """The help panel is narrow: a third column shows one letter a line."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [row for row in rows if row.replace("\\|", "").count("|") != 3] == []


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: str(p.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    """The help panel finds pictures beside the page, and nothing else: a link to another page would be one of the server's."""
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://")] == []


@pytest.mark.parametrize("node", SCHEMAS)
def test_names_fit_the_library(node):
    for language in ("en", "zh"):
        entry = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))[node]
        assert len(entry["display_name"]) <= 32


def pictures(page: Path) -> list[str]:
    return [link or source for _, link, source in PICTURE.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_help_page_has_a_picture_with_words(node):
    """The help panel resolves names against web/docs/, in every language; words are for who cannot see it."""
    for page in (DOCS / f"{node}.md", DOCS / node / "zh.md"):
        found = pictures(page)
        assert found and all((DOCS / name).is_file() for name in found), page
        assert all(words for words, link, _ in PICTURE.findall(page.read_text(encoding="utf-8")) if link), page


def test_readme_shows_only_pictures_that_exist():
    shown = [name for name in pictures(ROOT / "README.md") if not name.startswith("http")]
    assert [name for name in shown if not (ROOT / name).is_file()] == []


def test_pictures_are_small_and_used():
    shown = {(DOCS / name).resolve() for page in DOCS.rglob("*.md") for name in pictures(page)}
    files = [*DOCS.rglob("*.webp"), *DOCS.rglob("*.png")]
    assert [file.name for file in files if file.resolve() not in shown] == []
    assert max(file.stat().st_size for file in files) < 200_000
    assert (ROOT / "web" / "dense_beside_sparse.webp").stat().st_size < 1_000_000


@pytest.mark.parametrize("node", SCHEMAS)
def test_chinese_texts_are_chinese(node):
    entry = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))[node]
    fields = [*entry.get("inputs", {}).values(), *entry["outputs"].values()]
    texts = [entry["display_name"], entry["description"], *(field["tooltip"] for field in fields)]
    assert [text for text in texts if not CHINESE.search(text)] == []


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node", SCHEMAS)
def test_every_node_input_and_output_is_named_in_each_language(node, language):
    entry = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))[node]
    assert entry["display_name"] and entry["description"]
    assert set(entry.get("inputs", {})) == set(SCHEMAS[node]["inputs"])
    assert all(text["name"] and text["tooltip"] for text in entry.get("inputs", {}).values())
    assert set(entry["outputs"]) == {str(i) for i in range(len(SCHEMAS[node]["outputs"]))}
    assert all(text["name"] and text["tooltip"] for text in entry["outputs"].values())


def test_no_text_speaks_of_a_node_that_is_gone():
    for language in ("en", "zh"):
        assert set(json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))) == set(
            SCHEMAS
        )
    assert {page.stem for page in (ROOT / "web" / "docs").glob("*.md")} == set(SCHEMAS)


@pytest.mark.parametrize(
    "file, by_head, neighbours, means",
    [
        ("EVDiTModelLoader.md", "by head", "neighbours", "mean frames"),
        ("EVDiTModelLoader/zh.md", "按注意力头", "邻帧", "均值帧"),
    ],
)
def test_the_loader_s_page_says_which_plan_the_sparse_tiny_model_carries(file, by_head, neighbours, means):
    about = metadata_of(tiny_path("transformer", "tiny-8-steps-sparse"))
    plan = about.tile_plan if about else None
    assert plan and plan.frames
    heads = [pattern for layer in plan.patterns if isinstance(layer, HeadPatterns) for pattern in layer.kinds]
    assert any(pattern.window for pattern in heads) and any(pattern.means for pattern in heads)
    text = (DOCS / file).read_text(encoding="utf-8")
    (said,) = [line for line in text.splitlines() if "`tiny 8 steps sparse (built in)`" in line]
    share = f"{100 * plan.density(plan.frames):.0f} %"
    assert [words for words in (by_head, neighbours, means, share, "the loaded model") if words not in said] == []
    assert not re.search(r"`\d+:", said)  # the whole plan is too long for the page, and another one is wrong


def test_there_are_workflows():
    assert WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_can_be_shown_and_resolved(path):
    """The picture is there, and no node is gone; test_templates.py has the rest."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".jpg").stat().st_size > 1000
    assert {node["type"] for node in workflow["nodes"] if node["type"].startswith("EVDiT")} <= set(SCHEMAS)
