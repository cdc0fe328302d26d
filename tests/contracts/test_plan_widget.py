"""The page's rules for plans are those of the engine: web/js/plan_text.js and pattern.js beside plan/text.py, tiles.py and
head_patterns.py, run by Node.js."""

import itertools
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.plan.text import write_layers
from efficient_vdit_core.tiles import TilePattern

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "web" / "js").glob("*.js"))
NODE = shutil.which("node")
if NODE is None:
    warnings.warn("NO NODE.JS: the page's rules for plans were not compared with the engine's", stacklevel=1)
needs_node = pytest.mark.skipif(
    NODE is None, reason="NO NODE.JS: the page's rules for plans were not compared with the engine's"
)

GOOD = [
    "all:2",
    "all:full",
    "all:2:6 0-1:full -1:full",
    "all:0 -3:full",
    "0:full",
    "0:full 1-4:2:6 5-31:1:7",
    "0-3:0:8",
    "0:1:7~1 1-2:2:6~2",
    "all:2~1 -1:full",
    "0:[0,3]1:7~1[1]full[2]2:6[4]0:8~2 1:2:6~1 2:full",
    "0-1:[0-2]1[3]full",
    "0:[0]1[1]1 1:2~0",
    "0:[1]2~1[0]1",
    "0:1:7~1+1 1-2:2+2",
    "all:0+1 -1:full",
    "0:[0]1:7+1[1]2:6~1+3[2]full",
    "all:2+0",
    "0:" + "".join(f"[{head}]{head + 1}:{99 - head}" for head in range(70)),
]
GOOD += [" 1:2  0:FULL ", "\ufeff0:full 1:2", "0:full\x1c1:2\x85", "0:7:1", "0:[0]7:1[1]full[2]9 1:[0]7[1]1[2]full"]
# What the page says of a text that is no plan -> what the engine says, and such texts.
BAD = {
    "unreadable": (
        "(cannot be read|cannot be used|has 0 parts)",
        [
            "",
            "0:x",
            "0",
            "0:2;1:3",
            "0:99999",
            "0:1~",
            "0:1+",
            "0:1+1~1",
            "0:full+1",
            "0:[]1",
            "0:[0]1[x]2",
            "0:[1-0]1",
            "0:[0-9999]1",
            "all:２",
            "０:2",
            "0:[０]1",
        ],
    ),
    "windowRange": (
        "cannot be used at .* has the window .*, expected a whole number of frames from 0 to",
        ["0:1~999", "0:1~-1", "0:[0]1[1]2~257", "all:2~999+99"],
    ),
    "meansRange": (
        "cannot be used at .* mean frames, expected a whole number from 0 to",
        ["0:1+-1", "0:1+99", "all:2~99+99"],
    ),
    "tooManyFrames": ("asks for more than 1024 frames", ["all:1025", "0:9999", "0:1000:25", "0:[0]1[1]2:1023"]),
    "leavesOutLayer": ("leaves out layer", ["1:2", "0:2:6 5:1:7", "99:full", "0:1 2-3:full 9:1"]),
    "layerTwice": ("is named twice", ["0:2 0:3", "0-3:2 5:1 2-4:full"]),
    "layersAscend": ("expected ascending ones", ["3-1:2", "0-1024:2", "1024:full", "all:2 -1024:full"]),
    "fromTheEnd": ("counts from the end", ["-1:2", "0:full -1:full"]),
    "allFirst": ("must stand first and once", ["all:2 1:3", "0:2 all:1", "all:1 all:2", "all:1 0:[0]1[1]full"]),
    "allAlike": ("the heads of 'all:...' are alike", ["all:[0]1[1]full"]),
    "leavesOutHead": ("leaves out head", ["0:[0-1]1[3]full", "0:[1]2"]),
    "headTwice": ("names head . twice", ["0:[0-1]1[1]full"]),
    "twoLengths": ("speaks of", ["0:2:6 1:2:7", "0:[0]1[1]2:6[2]2:7", "all:2:6 0:1:8 1:full"]),
    "twoHeadCounts": ("heads, expected one number", ["0:[0]1:7[1]full 1:[0]1:7[1]2:6[2]full"]),
}


def run_module(code: str) -> Any:
    """What a JavaScript module prints, as JSON."""
    done = subprocess.run(
        [NODE or "node", "--input-type=module"], input=code, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_node(body: str, data: Any) -> Any:
    """The JSON that a JavaScript function body returns for the data, with the module's functions in scope."""
    plans, tiles = ((ROOT / "web" / "js" / name).as_uri() for name in ("plan_text.js", "pattern.js"))
    code = f"import {{ parsePlan, formatPlan, layerPattern, cycleLayer, writeOut }} from '{plans}';\n"
    code += f"import {{ referenceFrames, density, patternName, isFull }} from '{tiles}';\n"
    return run_module(code + f"const data = {json.dumps(data)};\nconsole.log(JSON.stringify((() => {{ {body} }})()));")


def patterns(plan: TilePlan, depth: int) -> list[str]:
    """The patterns' short names, as the page holds them."""
    every = [plan.pattern(i, depth) for i in range(len(plan.patterns) or depth)]
    return [write_layers([pattern], None).removeprefix("0:") for pattern in every]


@needs_node
def test_both_read_and_write_the_same_text():
    depth = 9
    body = """return data.map(text => { const plan = parsePlan(text); const n = plan.layers?.length ?? 9;
        return [[...Array(n).keys()].map(i => layerPattern(plan, i, n)), plan.frames, formatPlan(plan)]; })"""
    for text, (found, frames, again) in zip(GOOD, in_node(body, GOOD), strict=True):
        plan = TilePlan.from_text(text)
        assert (found, frames, again) == (patterns(plan, depth), plan.frames, plan.to_text()), text


REFUSE = """return data.map(text => { try { parsePlan(text); return ['read', {}] }
    catch (error) { return [error.why ?? `crash: ${error}`, error.values] } })"""


@needs_node
@pytest.mark.parametrize("why", BAD)
def test_both_refuse_the_same_text_for_the_same_reason(why):
    """The page's message holds the same numbers: the layer, the head or the count that is wrong, and the range."""
    said, texts = BAD[why]
    for text, (found, values) in zip(texts, in_node(REFUSE, texts), strict=True):
        with pytest.raises(ValueError, match=said) as error:
            TilePlan.from_text(text)
        assert found == why, text
        numbers = [str(value) for name, value in values.items() if name != "part"]
        assert [number for number in numbers if number not in str(error.value)] == [], text


@needs_node
def test_both_judge_any_text_alike():
    """Every two parts of these pieces, and every good text without one of its letters."""
    where = ["all", "0", "1", "-1", "0-1", "2-1", "1023"]
    what = [
        "full",
        "2",
        "2:6",
        "1:7~1+1",
        "1025",
        "2~300",
        "2+17",
        "[0]1[1]full",
        "[0-1]1[1]2",
        "[1]2",
        "[0]2:6[1]1:8",
        "[0]1[1]2[2]full",
    ]
    parts = [":".join(pair) for pair in itertools.product(where, what)]
    texts = [" ".join(pair) for pair in itertools.product(parts, ["", *parts])]
    texts += [text[:i] + text[i + 1 :] for text in GOOD for i in range(len(text))]
    found = [why for why, _ in in_node(REFUSE, texts)]
    for text, why in zip(texts, found, strict=True):
        try:
            TilePlan.from_text(text)
        except ValueError as error:
            assert why in BAD and re.search(BAD[why][0], str(error)), (text, why, str(error))
        else:
            assert why == "read", text
    assert set(BAD) | {"read"} == set(found)


@needs_node
def test_both_place_the_same_reference_frames():
    names = itertools.product(map(str, range(31)), ("", "~1", "~3"), ("", "+1", "+3"))
    every = ["".join(parts) for parts in names]
    cases = [
        (p, frames)
        for frames in range(1, 30)
        for p in ["full", *every]
        if p == "full" or int(re.split(r"[~+]", p)[0]) < frames + 2
    ]
    body = "return data.map(([k, t]) => [referenceFrames(k, t), density(k, t), patternName(k, t), isFull(k, t)])"
    for (text, frames), (found, share, name, full) in zip(cases, in_node(body, cases), strict=True):
        pattern = TilePattern.parse(text)
        assert found == list(pattern.reference_frames(frames)) and name == pattern.name(frames), (text, frames)
        assert share == pytest.approx(pattern.density(frames)) and full == pattern.is_full(frames)
    mixed = by_head([TilePattern(2), TilePattern(1, window=1), TilePattern(None), TilePattern(2)])
    name = write_layers([mixed], None).removeprefix("0:")
    assert in_node("return density(data, 9)", name) == pytest.approx(mixed.density(9))


@needs_node
def test_cycling_changes_one_layer_and_comes_round():
    """Around and back: every text on the way is a plan of the engine's that differs in that layer only."""
    body = """const [text, back] = data, found = []; let plan = parsePlan(text);
        for (let i = 0; i < 12; i++) { plan = cycleLayer(plan, 2, 5, plan.frames ?? 21, back); found.push(formatPlan(plan)); }
        return found"""
    for start in ("0-4:2:19", "0-4:full", "0-4:2", "all:2", "all:2 -3:full", "all:3 1-3:full", "0-4:[0]1:19~1[1]2:18"):
        before = patterns(TilePlan.from_text(start), 5)
        for back in (False, True):
            texts = in_node(body, (start, back))
            after = [patterns(TilePlan.from_text(text), 5) for text in texts]
            assert all(a[:2] + a[3:] == before[:2] + before[3:] for a in after), texts
            assert before[2] in [a[2] for a in after] and len({a[2] for a in after}) > 1, texts
            assert all(a[2] != b[2] for a, b in zip(after, after[1:], strict=False)), texts


@needs_node
@pytest.mark.parametrize("text", ["all:2 0-1:full -1:full", "all:2:6 0-1:full -1:full"])
def test_writing_out_keeps_every_layer(text):
    written = in_node("return formatPlan(writeOut(parsePlan(data), 6))", text)
    assert written == {None: "0-1:full 2-4:2 5:full", 8: "0-1:full 2-4:2:6 5:full"}[TilePlan.from_text(text).frames]
    assert patterns(TilePlan.from_text(written), 6) == patterns(TilePlan.from_text(text), 6)


@needs_node
def test_the_preview_length_stays_out_of_the_plan():
    """A plan for any length is one after an edit too: at 8 latent frames it keeps as many reference frames as before."""
    edit = "return formatPlan(cycleLayer(writeOut(parsePlan(data), 3), 1, 3, 21))"
    for text, reference_frames in (("all:2", 2), ("all:30", 30)):
        edited = TilePlan.from_text(in_node(edit, text))
        assert edited.frames is None and edited.pattern(1) != TilePattern(reference_frames)
        assert edited.pattern(0) == edited.pattern(2) == TilePattern(reference_frames)


PAGE = """
class Element {
  style = {}; dataset = {}; children = []; offsetWidth = 0;
  classList = { toggle() {} };
  setAttribute() {} addEventListener() {}
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  querySelectorAll() { return []; }
  matches() { return false; }
  attachShadow() { return new Element(); }
}
globalThis.document = { createElement: () => new Element(), createElementNS: () => new Element() };
globalThis.ResizeObserver = class { observe() {} };
"""


def chart_alone(folder: Path) -> None:
    """Copies the scripts that need no ComfyUI."""
    for script in SCRIPTS:
        if "app.js" not in script.read_text(encoding="utf-8"):
            shutil.copy(script, folder)


@needs_node
def test_a_draw_counts_the_tiles_of_each_pattern_once(tmp_path):
    """A count takes T x T steps: one for each bar, or for each comparison of two, stood still for seconds on a long clip."""
    chart_alone(tmp_path)
    rules = (tmp_path / "pattern.js").read_text(encoding="utf-8")
    counting = "let kept = "
    assert rules.count(counting) == 1
    (tmp_path / "pattern.js").write_text(rules.replace(counting, f"globalThis.counts++; {counting}"), encoding="utf-8")
    kinds = [f"{k}{near}" for k in range(1, 11) for near in ("", "~1")]
    layer = "".join(f"[{head}]{kind}" for head, kind in enumerate(kinds))
    code = f"""{PAGE}
        const [chart, text] = await Promise.all(["plan_chart.js", "plan_text.js"].map((f) => import("{tmp_path.as_uri()}/" + f)));
        globalThis.counts = 0;
        const drawn = new chart.PlanChart((key) => key, {{}});
        drawn.draw({{ plan: text.parsePlan("0-49:{layer}"), frames: 92, depth: 50, editable: true }});
        const children = (element) => element.children.length;
        console.log(JSON.stringify([globalThis.counts, ...[drawn.bars, drawn.lines, drawn.legend].map(children)]));"""
    counts, *children = run_module(code)
    assert children == [50 + 1, 2, 1 + len(kinds)]  # with the lines' group, those of the grid, and what is counted
    assert counts == len(kinds)


@needs_node
def test_a_short_text_of_a_long_clip_makes_no_endless_picture(tmp_path):
    """A map of T x T pieces for each group of heads: a text of 400 bytes stood still for half a minute at 1024 frames."""
    chart_alone(tmp_path)
    heads = "".join(f"[{head}]{100 + head}:{200 - head}~{head}" for head in range(20))
    code = f"""{PAGE}
        let pieces = 0;
        Element.prototype.setAttribute = (name, value) => {{ if (name === "d") pieces += value.split("M").length - 1; }};
        const [chart, text] = await Promise.all(["plan_chart.js", "plan_text.js"].map((f) => import("{tmp_path.as_uri()}/" + f)));
        const said = [];
        const drawn = new chart.PlanChart((key, values) => {{ said.push([key, values?.count]); return key; }}, {{}});
        drawn.draw({{ plan: text.parsePlan("0-1:{heads}"), frames: 300, depth: 2, editable: true }});
        const more = said.filter(([key]) => key === "moreGroups");
        console.log(JSON.stringify([pieces, drawn.maps.children.length, more]));"""
    pieces, maps, more = run_module(code)
    assert 16 < pieces <= 16 * 30_000 and maps == 16 + 1 and more == [["moreGroups", 4]]


@needs_node
def test_what_a_pattern_computes_is_told_without_a_look_at_each_tile():
    body = """let looks = 0; const { abs } = Math; Math.abs = (value) => { looks++; return abs(value); };
        return [density("200~3+4", 500), isFull("200~3+4", 500), looks]"""
    share, full, looks = in_node(body, None)
    assert share == pytest.approx(TilePattern(200, window=3, means=4).density(500)) and not full and looks <= 500


@needs_node
def test_a_page_that_stays_open_keeps_the_latest_patterns_alone(tmp_path):
    chart_alone(tmp_path)
    rule = "const made = []; const rule = once((pattern, frames) => made.push(`${pattern} ${frames}`), 2);"
    asked = 'for (const pattern of ["1", "1", "2", "3", "3", "1"]) rule(pattern, 8);'
    code = f"import {{ once }} from '{tmp_path.as_uri()}/pattern.js'; {rule} {asked} console.log(JSON.stringify(made));"
    assert run_module(code) == ["1 8", "2 8", "3 8", "1 8"]


def test_the_page_uses_official_interfaces_only():
    source = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    assert source.count("registerExtension") == 1
    abroad = r"https?://(?!www\.w3\.org/2000/svg)"
    for forbidden in (
        r"\.prototype\b",
        r"scripts/ui",
        r"\beval\(",
        r"new Function",
        r"innerHTML",
        abroad,
        r"\bfetch\(",
    ):
        assert not re.search(forbidden, source), forbidden
    assert set(re.findall(r"scripts/(\w+)\.js", source)) <= {"app", "api"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_text_of_the_chart_is_there(language):
    source = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    texts = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["efficientVDiT"]
    asked = set(re.findall(r'\bsay\((?:\w+ \? )?"(\w+)"', source)) | set(re.findall(r'\bkey\("(\w+)"', source))
    asked |= set(itertools.chain(*re.findall(r'\bsay\([^()]+ \? "(\w+)" : "(\w+)"', source)))
    asked |= set(re.findall(r'\bwrong\("(\w+)"', source)) | set(re.findall(r'\bonlyNumber\(.*, "(\w+)"\)', source))
    asked |= {name + part for name in re.findall(r'\bnumberField\("(\w+)"', source) for part in ("", "Title")}
    assert asked == set(texts)
    english = json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["efficientVDiT"]
    for key, text in texts.items():
        assert text and set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", english[key])), key


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("key", "gain"), [("bound", "{bound}"), ("timed", "{gain}")])
def test_a_line_that_may_be_cut_begins_with_the_gain(language, key, gain):
    text = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["efficientVDiT"][key]
    assert re.findall(r"\{\w+\}", text)[0] == gain
