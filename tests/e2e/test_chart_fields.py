"""The chart's own fields, and what the page does to it while somebody uses them."""

import re

import pytest
from plan_node import NOTICE, SET, TEXT, plan_node

RENDERERS = pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes2"])
HEARD = """type => {
    window.heard = false;
    document.addEventListener(type, () => { window.heard = true; }, { once: true });
}"""


def opened(comfy, modern: bool):
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    if modern and comfy.version() < (1, 28):
        pytest.skip("NODES 2.0 OF THIS FRONTEND DRAW NO PACK'S OWN WIDGETS; the node works without its chart")
    return page


@RENDERERS
def test_a_click_on_the_button_counts_that_leaves_a_field(comfy, modern):
    page = opened(comfy, modern)
    chart = plan_node(comfy, "all:2")
    chart.get_by_label("layers", exact=True).fill("40")
    chart.get_by_role("button", name="edit each layer").click()
    page.wait_for_function(f"{TEXT} === '0-39:2'")


@RENDERERS
def test_the_keyboard_goes_on_from_the_button_to_the_layers(comfy, modern):
    """The button is gone with its press; the focus must not be lost with it."""
    page = opened(comfy, modern)
    chart = plan_node(comfy, "all:2")
    chart.get_by_role("button", name="edit each layer").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"{TEXT} === '0-31:2'")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{TEXT} !== '0-31:2'")
    assert chart.get_by_role("listbox").evaluate("e => e.getRootNode().activeElement === e")


@RENDERERS
def test_a_field_keeps_the_focus_while_the_arrows_change_it(comfy, modern):
    page = opened(comfy, modern)
    chart = plan_node(comfy, "all:2")
    field = chart.get_by_label("latent frames", exact=True)
    field.focus()
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    assert field.input_value() == "24"
    chart.get_by_text("24 latent frames").wait_for()


def test_what_is_typed_stays_where_the_chart_is_drawn_anew(comfy):
    page = comfy.open().page
    chart = plan_node(comfy, "all:2")
    field = chart.get_by_label("latent frames", exact=True)
    field.fill("9")
    page.evaluate("app.graph.nodes[0].onConnectionsChange()")
    assert field.input_value() == "9"
    page.keyboard.press("Tab")
    chart.get_by_text("9 latent frames").wait_for()


def test_a_field_keeps_its_keys_and_what_is_pasted(comfy):
    """On the page they would delete nodes, or paste some."""
    page = comfy.open().page
    field = plan_node(comfy, "all:2").get_by_label("latent frames", exact=True)
    for kind, type_, about in (("ClipboardEvent", "paste", ""), ("KeyboardEvent", "keydown", "key: 'Delete', ")):
        page.evaluate(HEARD, type_)
        field.evaluate(f"e => e.dispatchEvent(new {kind}('{type_}', {{ {about}bubbles: true, composed: true }}))")
        assert page.evaluate("window.heard") is False, type_


def test_ctrl_enter_runs_the_workflow_from_a_field_too(comfy):
    page = comfy.open().page
    plan_node(comfy, "all:2").get_by_label("latent frames", exact=True).focus()
    answer = {"prompt_id": "from a field", "number": 1, "node_errors": {}}
    page.route("**/prompt", lambda route: route.fulfill(json=answer))
    with page.expect_request("**/prompt"):
        page.keyboard.press("Control+Enter")
    page.unroute("**/prompt")


@RENDERERS
def test_the_pointer_may_rest_where_a_shorter_plan_has_no_layer(comfy, modern):
    page = opened(comfy, modern)
    chart = plan_node(comfy, "all:2")
    chart.get_by_role("option", name="Layer 20:").hover()
    page.evaluate(SET, ["EVDiTTilePlan", "text", "0-5:2:6"])
    chart.get_by_text("2:6 × 6").wait_for()
    chart.locator(".detail b", has_text=re.compile("^Layer [0-5]$")).wait_for()


def test_a_click_shows_that_the_file_is_not_used_any_more(comfy):
    page = comfy.open().page
    page.evaluate("void app.graph.add(LiteGraph.createNode('EVDiTLoadTilePlan'))")
    chart = page.locator(".evdit-plan-chart:visible").first
    disabled = "!!app.graph.nodes[0].widgets.find(w => w.name === 'plan_name').disabled"
    chart.get_by_role("option", name="Layer 5:").wait_for()
    assert page.evaluate(disabled) is False
    chart.get_by_role("option", name="Layer 5:").click()
    page.wait_for_function(disabled)
    page.evaluate(SET, ["EVDiTLoadTilePlan", "text", ""])
    page.wait_for_function(f"!({disabled})")


def test_a_file_that_is_not_in_the_list_is_named(comfy):
    page = comfy.open().page
    page.evaluate("void app.graph.add(LiteGraph.createNode('EVDiTLoadTilePlan'))")
    chart = page.locator(".evdit-plan-chart:visible").first
    page.evaluate(SET, ["EVDiTLoadTilePlan", "plan_name", "gone.json"])
    chart.locator(".wrong", has_text="gone.json is not among the plans").wait_for()


@RENDERERS
def test_the_chart_changes_its_language_with_the_page(comfy, modern):
    page = opened(comfy, modern)
    chart = plan_node(comfy, "all:2")
    chart.get_by_text("of attention", exact=False).first.wait_for()
    # The page builds the graph anew in the other language, from what it has noticed of it.
    page.evaluate(NOTICE)
    page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    chart.get_by_text("个潜帧", exact=False).first.wait_for()
    page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'en')")
    chart.get_by_text("of attention", exact=False).first.wait_for()


@pytest.mark.parametrize("preview", ["{ depth: -5 }", '"x"', "{ frames: 2.5, depth: 1e9 }"])
def test_a_preview_of_a_file_that_cannot_be_is_left_out(comfy, preview):
    page = comfy.open().page
    chart = plan_node(comfy, "all:2")
    page.evaluate(f"app.graph.nodes[0].properties.evdit_preview = {preview}; app.graph.nodes[0].onConfigure?.()")
    chart.get_by_text("2:19 × 32").wait_for()
