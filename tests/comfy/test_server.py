"""The pack as a user meets it: ComfyUI's server, over HTTP."""

import copy
import json
import os
import re
import struct
from pathlib import Path

import imageio.v3 as imageio
import pytest
import websocket

ROOT = Path(__file__).parents[2]
NODES = {
    "EVDiTModelLoader",
    "EVDiTTextEncoderLoader",
    "EVDiTVAELoader",
    "EVDiTTilePlan",
    "EVDiTSparseAttention",
    "EVDiTConsistencySigmas",
    "EVDiTConsistencySampler",
    "EVDiTCompareVideos",
    "EVDiTSearchTilePlan",
    "EVDiTSaveTilePlan",
    "EVDiTLoadTilePlan",
    "EVDiTAttentionTileMap",
    "EVDiTReport",
    "EVDiTSequenceParallel",
}


def key_of(prompt: dict, kind: str) -> str:
    """The id of the one node of this class."""
    (key,) = [key for key, node in prompt.items() if node["class_type"] == kind]
    return key


def find(prompt: dict, kind: str) -> dict:
    """The inputs of the one node of this class."""
    return prompt[key_of(prompt, kind)]["inputs"]


def without_sparse_attention(prompt: dict) -> dict:
    """As the page sends it where that node is bypassed: what its model went to is given the one that it got."""
    bypassed = key_of(prompt, "EVDiTSparseAttention")
    source = prompt.pop(bypassed)["inputs"]["model"]
    for node in prompt.values():
        node["inputs"].update({name: source for name, value in node["inputs"].items() if value == [bypassed, 0]})
    return prompt


def test_the_pack_loads_without_a_complaint(server):
    server.get("/object_info/EVDiTModelLoader")
    log, started, _ = server.text().partition("To see the GUI go to")  # behind it, what other tests' prompts were told
    assert started
    ours = [
        line
        for line in log.splitlines()
        if re.search("efficient|evdit", line, re.I) and re.search("warn|error|traceback|import failed", line, re.I)
    ]
    assert not ours, ours


def recorded(path, got, indent):
    """The file holds ``got``, or is written so with EVDIT_RECORD. As text: a dictionary would forgive another order, and saved
    workflows hold widget values by position."""
    text = json.dumps(got, indent=indent, ensure_ascii=False) + "\n"
    if os.environ.get("EVDIT_RECORD"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_node_is_there_with_tooltips(server):
    info = server.get("/object_info")
    assert {name for name in info if name.startswith("EVDiT")} == NODES
    for name in NODES:
        for section in ("required", "optional"):  # "hidden" is no input that a user sees
            for field, spec in info[name]["input"].get(section, {}).items():
                assert spec[1].get("tooltip"), f"{name}.{field}"
        assert all(info[name]["output_tooltips"]), name


def english_texts(info):
    """What the schemas say, as the page looks it up."""
    found = {}
    for name in sorted(NODES):
        node = info[name]
        declared = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        inputs = {field: {"name": field, "tooltip": spec[1].get("tooltip")} for field, spec in declared.items()}
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        found[name] = {
            **{key: node[key] for key in ("display_name", "description")},
            "inputs": inputs,
            "outputs": {str(i): {"name": shown, "tooltip": tooltip} for i, (shown, tooltip) in enumerate(outputs)},
        }
    return found


def test_the_english_texts_are_the_nodes_own(server):
    """locales/en repeats what the schemas say, so that a translator sees what to translate. EVDIT_RECORD=1 writes it."""
    recorded(ROOT / "locales/en/nodeDefs.json", english_texts(server.get("/object_info")), indent=2)


def test_the_page_hears_of_the_progress(server, tiny_prompt):
    """Over the websocket: the sampler's steps one by one, to the last, then the end."""
    events, prompt = [], tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(segments=3, steps=3)
    find(prompt, "EVDiTTilePlan").update(
        text="all:2"
    )  # the default, said so that no earlier run's plan is taken from the cache
    server.run(prompt, events)
    (sampler,) = [key for key, node in prompt.items() if node["class_type"] == "SamplerCustomAdvanced"]
    steps = [(d["value"], d["max"]) for kind, d in events if kind == "progress" and d.get("node") == sampler]
    assert steps and steps[-1][0] == steps[-1][1] and [s[0] for s in steps] == sorted(s[0] for s in steps)
    # Newer versions of ComfyUI send no more than ten values a second, but always the first and the last.
    assert {s[0] for s in steps} >= {1, steps[-1][1]}
    assert events[-1][0] == "execution_success"
    (report,) = [data for kind, data in events if kind == "efficient_vdit.report"]
    (sparse,) = [key for key, node in prompt.items() if node["class_type"] == "EVDiTSparseAttention"]
    assert (report["node"], report["plan"], report["frames"]) == (sparse, "all:2", 8)
    assert report["prompt_id"] == events[-1][1]["prompt_id"]
    assert report["video"] == 1.0 and 1.0 < report["bound"] < 1 / report["density"]
    assert report["sparse"] >= 6 * steps[-1][1] and 0.5 < report["density"] < 0.55 and report["seconds"] > 0
    assert report["layers"] * steps[-1][1] <= report["sparse"]
    (made,) = [
        data["output"] for kind, data in events if kind == "executed" and "evdit_plan" in (data.get("output") or {})
    ]
    assert made["evdit_plan"] == ["all:2"]


def test_a_node_of_another_id_hears_of_its_own_run(server, tiny_prompt):
    """As where it has become part of a subgraph: ComfyUI's cache would give it the MODEL that tells the old one."""
    nodes = []
    for inside in ("", "99:"):
        renamed = {f"{inside}{key}": node for key, node in tiny_prompt().items()}
        for node in renamed.values():
            links = {name: [f"{inside}{x[0]}", x[1]] for name, x in node["inputs"].items() if isinstance(x, list)}
            node["inputs"].update(links)
        find(renamed, "EVDiTConsistencySigmas").update(segments=3, steps=3)
        find(renamed, "RandomNoise").update(noise_seed=len(inside))
        events = []
        assert server.run(renamed, events)["status"]["status_str"] == "success"
        (report,) = [data for kind, data in events if kind == "efficient_vdit.report"]
        nodes.append((report["node"], renamed.get(report["node"], {}).get("class_type")))
    assert [kind for _, kind in nodes] == ["EVDiTSparseAttention"] * 2


def test_a_measured_step_stands_on_the_node_and_in_the_message(server, tiny_prompt):
    events, prompt = [], tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(segments=3, steps=3)
    find(prompt, "EVDiTSparseAttention").update(measure=True)
    server.run(prompt, events)
    (report,) = [data for kind, data in events if kind == "efficient_vdit.report"]
    assert report["dense_step"] > 0 and report["sparse_step"] > 0
    shown = [text for kind, (node, text) in ((k, d) for k, d in events if k == "text") if node == report["node"]]
    assert len(shown) == 1 and re.fullmatch(r"[\d.]+x (faster|slower): dense [\d.]+ s, sparse [\d.]+ s", shown[0])
    assert "Measured in this run: a dense step" in server.text()


def told_of(server, prompt: dict) -> list[dict]:
    """What the page hears of sparse attention in a run of this prompt."""
    events = []
    assert server.run(prompt, events)["status"]["status_str"] == "success"
    return [data for kind, data in events if kind == "efficient_vdit.report"]


def test_every_run_is_told_and_what_came_from_the_cache_is_not(server, tiny_prompt):
    prompt = tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(segments=3, steps=3)
    find(prompt, "RandomNoise").update(noise_seed=71)
    (sparse,) = told_of(server, prompt)
    assert sparse["calls"] >= sparse["sparse"] > 0 and sparse["why"] == ""
    assert told_of(server, prompt) == []
    find(prompt, "EVDiTSparseAttention").update(min_tokens=1_000_000)
    (dense,) = told_of(server, prompt)
    assert (dense["sparse"], dense["calls"]) == (0, sparse["calls"])
    assert dense["why"] == f"{dense['calls']} below min_tokens"


def test_two_samplers_of_one_model_are_both_told_in_order(server, tiny_prompt):
    prompt = tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(segments=3, steps=3)
    find(prompt, "RandomNoise").update(noise_seed=72)
    sampler, levels = (key_of(prompt, kind) for kind in ("SamplerCustomAdvanced", "EVDiTConsistencySigmas"))
    first = copy.deepcopy(prompt[sampler])
    prompt["half"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": [levels, 0], "step": 1}}
    first["inputs"]["sigmas"], prompt[sampler]["inputs"]["sigmas"] = ["half", 0], ["half", 1]
    prompt["first"], prompt[sampler]["inputs"]["latent_image"] = first, ["first", 0]
    one, two = told_of(server, prompt)
    assert one["node"] == two["node"] == key_of(prompt, "EVDiTSparseAttention")
    assert one["prompt_id"] == two["prompt_id"] and 2 * one["sparse"] == two["sparse"] > 0


def test_a_page_hears_nothing_of_a_run_that_nobody_s_page_queued(server, tiny_prompt):
    """A script's run: another page could take its node for one of its own of the same number."""
    heard, queued, prompt = set(), [], tiny_prompt()
    find(prompt, "EVDiTTilePlan").update(text="all:3")
    page = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=bystander", timeout=60)
    try:
        status, answer = server.post("/prompt", {"prompt": prompt})
        assert status == 200, answer
        while queued[-2:] != [1, 0]:
            message = page.recv()
            kind, data = json.loads(message).values() if isinstance(message, str) else ("preview", message)
            heard.add(kind)
            queued += [data["status"]["exec_info"]["queue_remaining"]] if kind == "status" else []
    finally:
        page.close()
    assert server.get(f"/history/{answer['prompt_id']}")[answer["prompt_id"]]["status"]["status_str"] == "success"
    assert "efficient_vdit.report" not in heard


def schemas(info: dict) -> dict:
    """What a saved workflow relies on: ids, input order, types, defaults and ranges, outputs."""
    found = {}
    for name in sorted(NODES):
        inputs = {}
        for section in ("required", "optional"):
            for field, (kind, *options) in info[name]["input"].get(section, {}).items():
                kept = {
                    k: v for k, v in (options[0] if options else {}).items() if k in ("default", "min", "max", "step")
                }
                kind = "COMBO" if isinstance(kind, list) else kind
                inputs[field] = {"type": kind, "required": section == "required", **kept}
        outputs = zip(info[name]["output"], info[name]["output_name"], strict=True)
        found[name] = {"inputs": inputs, "outputs": [list(pair) for pair in outputs]}
    return found


def test_the_nodes_keep_what_they_promise(server):
    """To record a change that only appends: EVDIT_RECORD=1 pytest tests/comfy, then read the diff."""
    recorded(ROOT / "tests" / "contracts" / "schemas.json", schemas(server.get("/object_info")), indent=1)


WORDS = ("faster", "speed up", "speed", "accelerate", "sparse", "teacache", "wan faster", "multi gpu", "distill")


@pytest.mark.parametrize("word", WORDS)
def test_what_a_user_types_finds_a_node(server, word):
    ours = [node for name, node in server.get("/object_info").items() if name.startswith("EVDiT")]
    if "search_aliases" not in ours[0]:
        pytest.skip("THIS COMFYUI KNOWS NO SEARCH WORDS: nodes are found by their names")
    assert any(word in node["search_aliases"] for node in ours)


def test_the_pack_s_name_finds_every_node(server):
    ours = [node for name, node in server.get("/object_info").items() if name.startswith("EVDiT")]
    if "search_aliases" not in ours[0]:
        pytest.skip("THIS COMFYUI KNOWS NO SEARCH WORDS: nodes are found by their names")
    assert all({"Efficient-vDiT", "efficient vdit"} <= set(node["search_aliases"]) for node in ours)


@pytest.mark.parametrize("node", ["EVDiTSparseAttention", "EVDiTLoadTilePlan"])
def test_who_wants_a_faster_video_finds_the_two_nodes_that_do_it(server, node):
    found = server.get("/object_info")[node].get("search_aliases")
    if found is None:
        pytest.skip("THIS COMFYUI KNOWS NO SEARCH WORDS: nodes are found by their names")
    assert {"faster", "speed", "speed up", "accelerate", "efficient", "wan"} <= set(found)


@pytest.mark.parametrize("node", ["EVDiTSearchTilePlan", "EVDiTAttentionTileMap"])
def test_what_takes_minutes_is_not_made_again_under_another_seed(server, node):
    if not server.get("/object_info").get("SeedNode"):
        pytest.skip("THIS COMFYUI KNOWS NO SEED THAT STAYS: new nodes start on randomize")
    seed = server.get(f"/object_info/{node}")[node]["input"]["required"]["seed"][1]
    assert seed["control_after_generate"] == "fixed"


def test_what_few_change_is_shown_on_demand(server):
    inputs = server.get("/object_info")["EVDiTSparseAttention"]["input"]
    fields = {**inputs["required"], **inputs["optional"]}
    assert fields["backend"][1]["advanced"] and "advanced" not in fields["start_percent"][1]


def test_the_template_and_help_pages_are_served(server):
    shipped = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert {pack: sorted(names) for pack, names in server.get("/workflow_templates").items()} == {
        "efficient-vdit": shipped
    }
    assert "EVDiTTilePlan" in json.dumps(server.get("/i18n"))


def test_each_script_of_the_page_is_served_once(server):
    served = [path for path in server.get("/extensions") if "efficient" in path]
    scripts = (ROOT / "web" / "js").glob("*.js")
    assert sorted(served) == sorted(f"/extensions/efficient-vdit/js/{path.name}" for path in scripts)


def test_the_shipped_workflow_saves_a_video(server, tiny_prompt):
    prompt = tiny_prompt()
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (saved,) = [file for output in entry["outputs"].values() for file in output.get("images", [])]
    frames = imageio.imread(server.base / "output" / saved["subfolder"] / saved["filename"], plugin="FFMPEG")
    assert frames.shape == (29, 64, 64, 3)
    line = [line for line in server.text().splitlines() if "attention calls sparse" in line][-1]
    steps = find(prompt, "EVDiTConsistencySigmas")["steps"]
    assert int(re.search(r"(\d+) attention calls sparse", line)[1]) >= 6 * steps


def test_the_report_of_a_bypassed_sparse_attention_costs_no_clip(server, tiny_prompt):
    """It runs before the clip is decoded: an error there would leave nothing of what was sampled."""
    prompt = without_sparse_attention(tiny_prompt())
    find(prompt, "EVDiTConsistencySigmas").update(segments=2, steps=2)
    guider, sampler = (key_of(prompt, kind) for kind in ("CFGGuider", "SamplerCustomAdvanced"))
    model = prompt[guider]["inputs"]["model"]
    prompt["report"] = {"class_type": "EVDiTReport", "inputs": {"model": model, "after": [sampler, 0]}}
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert entry["outputs"][key_of(prompt, "SaveVideo")]["images"]
    (text,) = entry["outputs"]["report"]["text"]
    assert "no sparse attention" in text and text in server.text()


def test_a_linked_text_beside_a_plan_that_is_gone_is_sampled_once(server, tiny_prompt):
    """The file need not be there, and an equal prompt runs nothing again."""
    prompt = tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(segments=2, steps=2)
    prompt["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "all:4"}}
    prompt[key_of(prompt, "EVDiTTilePlan")] = {
        "class_type": "EVDiTLoadTilePlan",
        "inputs": {"plan_name": "gone_00001.json", "text": ["text", 0]},
    }
    assert server.run(prompt)["status"]["status_str"] == "success"
    again = dict(server.run(prompt)["status"]["messages"])
    assert {key_of(prompt, "EVDiTLoadTilePlan"), key_of(prompt, "SamplerCustomAdvanced")} <= set(
        again["execution_cached"]["nodes"]
    )


def test_a_report_without_after_says_what_to_connect_and_is_not_cached(server, tiny_prompt):
    prompt = tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(segments=2, steps=2)
    find(prompt, "EVDiTTilePlan").update(text="all:5")  # a MODEL of this test's own
    prompt["report"] = {"class_type": "EVDiTReport", "inputs": {"model": [key_of(prompt, "EVDiTSparseAttention"), 0]}}
    first, second = (server.run(prompt)["outputs"]["report"]["text"][0] for _ in range(2))
    assert first.startswith("No attention call was seen") and "sampler's LATENT to after" in first
    assert "Self-attention over the video" in second  # of the run before, sparse or not


@pytest.mark.parametrize("changes", [{}, {"preset": "manual", "manual_sigmas": "1, 0"}], ids=["segments", "manual"])
def test_a_checkpoint_that_no_preset_reads_may_be_gone(server, tiny_prompt, changes):
    prompt = tiny_prompt()
    levels = {"segments": 2, "steps": 2, "checkpoint": "loras/gone.safetensors", **changes}
    find(prompt, "EVDiTConsistencySigmas").update(levels)
    assert server.run(prompt)["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "from checkpoint"}, "'loras/gone.safetensors' is not in the list"),
        ({"preset": "five steps"}, "preset is 'five steps', expected one of segments"),
    ],
)
def test_what_the_levels_are_read_from_must_be_there(server, tiny_prompt, changes, words):
    prompt = tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(checkpoint="loras/gone.safetensors", **changes)
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400 and words in json.dumps(answer["node_errors"])


def failing(server, prompt, kind, **changes) -> str:
    find(prompt, kind).update(changes)
    return server.error(prompt)


def test_layers_that_do_not_exist_are_refused(server, tiny_prompt):
    assert "names layer 9" in failing(server, tiny_prompt(), "EVDiTSparseAttention", dense_blocks="9")
    assert "cannot be read" in failing(server, tiny_prompt(), "EVDiTSparseAttention", dense_blocks="first")


def test_fewer_steps_than_segments_are_refused(server, tiny_prompt):
    message = failing(server, tiny_prompt(), "EVDiTConsistencySigmas", segments=8, steps=4)
    assert "8" in message and "4" in message


@pytest.mark.parametrize("text", ["", "a red circle " * 400])
def test_empty_and_endless_prompts_run(server, tiny_prompt, text):
    prompt = tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(segments=2, steps=2)
    for node in prompt.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = text
    assert server.run(prompt)["status"]["status_str"] == "success"


@pytest.mark.parametrize("kind", ["truncated", "foreign"])
def test_wrong_files_are_named(server, tiny_prompt, kind):
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    whole = (ROOT / "efficient_vdit_core/assets/tiny/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    header = json.dumps(
        {"blocks.0.self_attn.q.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    content = {"truncated": whole[:-1000], "foreign": struct.pack("<Q", len(header)) + header + bytes(4)}[kind]
    (folder / f"{kind}.safetensors").write_bytes(content)
    message = failing(server, tiny_prompt(), "EVDiTModelLoader", model_name=f"{kind}.safetensors")
    assert {"truncated": "cut short or damaged", "foreign": "This file is Wan"}[kind] in message


def test_stopping_a_run_leaves_the_server_well(server, tiny_prompt):
    prompt = tiny_prompt()
    find(prompt, "EVDiTConsistencySigmas").update(segments=1000, steps=1000)
    status, answer = server.post("/prompt", {"prompt": prompt, "client_id": "stop"})
    assert status == 200
    while not server.get("/queue")["queue_running"]:
        pass
    for _ in range(200):
        server.post("/interrupt", {})
        if server.get(f"/history/{answer['prompt_id']}"):
            break
    messages = server.get(f"/history/{answer['prompt_id']}")[answer["prompt_id"]]["status"]["messages"]
    assert "execution_interrupted" in [kind for kind, _ in messages]
